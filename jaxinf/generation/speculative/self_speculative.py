"""The target drafts for itself, with some of its layers left out (Draft & Verify: Zhang et al. 2023,
arXiv:2309.08168)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.cache import Cache, Step
from jaxinf.generation.speculative.drafter import Draft, Drafter, View, check_nodes
from jaxinf.generation.speculative.writing import further, write_chain
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError, UnsupportedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelfSpeculative(Drafter):
    """No other model and no other cache: layers that run see the target's own keys, those that they write for a
    draft lie past the rows' lengths, and verifying overwrites them.

    skips: static, indices of the layers that drafting leaves out (`find_skips`). Where the target's layers are
      stacked, whole periods.
    tokens: static, a draft's length at most. confidence: static; a draft ends before a token of which no candidate
      has this probability (the paper's draft-exiting, with a fixed threshold); 0: never.
    """

    skips: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    tokens: int = dataclasses.field(default=4, metadata=dict(static=True))
    confidence: float = dataclasses.field(default=0.0, metadata=dict(static=True))

    @classmethod
    def of(cls, target: CausalLM, tokens: int = 4) -> SelfSpeculative:
        """Without a search: every other layer between the first and the last one is left out, or period of layers
        where they are stacked."""
        units = skippable(target)
        return cls(tuple(layer for unit in units[1:-1:2] for layer in unit), tokens)

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def draws(self) -> bool:
        return True

    @property
    def steps(self) -> bool:
        return True

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        check_confidence("confidence", self.confidence)
        depth, skips = target.spec.depth, self.skips
        if sorted({*skips}) != sorted(skips) or not all(0 <= layer < depth for layer in skips):
            raise InputError(f"skips={skips!r} must be different layers of 0 to {depth - 1}")
        if not 0 < len(skips) < depth:
            raise InputError(
                f"skips={skips!r} must leave out some of the {depth} layers and keep some: find_skips finds which"
            )
        for unit in skippable(target):
            if 0 < len({*unit} & {*skips}) < len(unit):
                raise UnsupportedError(
                    f'skips={skips!r} parts the layers {unit}, which a target of layout="stacked" runs together: '
                    'leave out all of them or none, or take layout="list"'
                )

    def init(self, target: CausalLM, batch: int, tokens: int) -> tuple[()]:
        return ()

    def draft(self, target: CausalLM, state: Any, view: View) -> tuple[Draft, Any, Cache]:
        forward = further(target, view.active, skip=self.skips)
        logits, cache = forward(view.tokens, view.cache)
        draft, cache = write_chain(forward, logits, cache, view, self.tokens, confidence=self.confidence)
        return draft, state, cache.roll_back(view.lengths)


def check_confidence(name: str, value: float) -> None:
    """Raises InputError unless `value` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(f"{name}={value!r} must be at least 0 and below 1")


@dataclass(frozen=True)
class Skips:
    """A set of layers to leave out, and what it promises.

    layers: for `SelfSpeculative.skips`. agreement: how often the rest's likeliest token is the target's.
    kept: the share of layers that drafting runs. tokens: the draft's length that pays best.
    speedup: over plain decoding, with such drafts.
    """

    layers: tuple[int, ...]
    agreement: float
    kept: float
    tokens: int
    speedup: float


def skippable(model: CausalLM) -> list[tuple[int, ...]]:
    """Layers that can be left out by themselves: each one, or where they are stacked, each repeat of a period."""
    units, first = [], 0
    for segment in model.spec.segments:
        together = 1 if model.layout == "list" else len(segment.period)
        units += [tuple(range(i, i + together)) for i in range(first, first + segment.layers, together)]
        first += segment.layers
    return units


def expected_speedup(agreement: float, kept: float, most: int) -> tuple[float, int]:
    """`(speed-up, length)` of the draft of 1 to `most` tokens that pays best: a draft of g takes g `kept` and its
    verification 1, in plain steps, for (1 - a^(g+1)) / (1 - a) tokens (Leviathan et al. 2023, equation 1)."""
    return max((sum(agreement**i for i in range(g + 1)) / (g * kept + 1), g) for g in range(1, most + 1))


def find_skips(
    model: CausalLM,
    tokens: Sequence[Sequence[int]] | np.ndarray,
    *,
    draft_tokens: int = 8,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Skips:
    """The layers whose absence promises the fastest drafts, by a greedy search on the host.

    Layer after layer is left out, each time the one without which the rest agrees best with the target; of all the
    sets on the way the one with the best `expected_speedup` is returned. Text is given, so agreement is that of
    each next token; the paper searches by the time of real generations with Bayesian optimisation. A model of n
    layers takes n (n + 1) / 2 passes over the text at most.

    Args:
      model: not on a mesh. tokens: int32 `[B, T]`, some text that the model writes well; memory grows with it.
      draft_tokens: of a draft at most. most: layers (periods where they are stacked) left out at most; None: all
        but one. progress: called with `(passes done, passes at most)`.

    Raises:
      InputError: text that is no `[B, T]`, or a model of one layer.
    """
    text, units = np.asarray(tokens, np.int32), skippable(model)
    if text.ndim != 2 or text.size == 0:
        raise InputError(f"tokens.shape={text.shape} must be [B, T] with some tokens")
    if len(units) < 2:
        raise InputError("the model has one layer (or period of layers) alone: nothing can be left out")
    check_nodes("draft_tokens", draft_tokens)
    rounds = len(units) - 1 if most is None else min(most, len(units) - 1)
    passes = sum(len(units) - i for i in range(rounds))
    wanted = _likeliest(model, text, np.zeros(model.spec.depth, bool))
    left: list[int] = []
    best, done = Skips((), 1.0, 1.0, 1, 1.0), 0
    for _ in range(rounds):
        tried = []
        for unit in sorted({*range(len(units))} - {*left}):
            layers = [layer for u in (*left, unit) for layer in units[u]]
            absent = np.isin(np.arange(model.spec.depth), layers)
            agreement = float(jnp.mean(_likeliest(model, text, absent) == wanted))
            kept = float(1 - absent.mean())
            speedup, length = expected_speedup(agreement, kept, draft_tokens)
            tried.append((speedup, unit, Skips(tuple(sorted(layers)), agreement, kept, length, speedup)))
            done += 1
            if progress is not None:
                progress(done, passes)
        _, unit, found = max(tried, key=lambda entry: entry[:2])
        left.append(unit)
        best = max(best, found, key=lambda skips: skips.speedup)
    return best


@jax.jit
def _likeliest(model: CausalLM, tokens: jax.Array, absent: jax.Array) -> jax.Array:
    """int32 `[B, T]`: the likeliest next token without the layers where `absent` bool `[depth]`. One program."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x, first = model.embedded(tokens, positions), 0
    for segment in model.segments:
        for i, block in enumerate(_blocks(segment)):
            x = jnp.where(absent[first + i], x, block(x, Step(positions), None)[0])
        first += segment.spec.layers
    return jnp.argmax(model.logits(x if model.final_norm is None else model.final_norm(x)), axis=-1)


def _blocks(segment) -> list:
    if segment.layout == "list":
        return list(segment.blocks)
    split = [nnx.split(block) for block in segment.blocks]
    return [
        nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        for i in range(segment.spec.repeats)
        for graph, state in split
    ]
