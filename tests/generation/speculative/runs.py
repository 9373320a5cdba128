"""Whole generations in one program, plainly and with a drafter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.cache import LayerCache
from jaxinf.generation import Runner, SamplingParams, generate
from jaxinf.generation.loop import first
from jaxinf.generation.sampling import Controls
from jaxinf.generation.speculative import Costs, Drafter, Speculator, begin, decode, read_piece

FAR = 1e4
"""What memory that nobody wrote holds: seen with any weight at all, it would drown everything else."""


def poisoned(tree: Any, value: jax.Array | float) -> Any:
    """Caches anywhere in a pytree, full of a value."""

    def poison(x):
        if not isinstance(x, LayerCache):
            return x
        return x.map_rows(
            lambda x, axis: jnp.full_like(x, value if jnp.issubdtype(x.dtype, jnp.floating) else 0x7F)
        )

    return jax.tree.map(poison, tree, is_leaf=lambda x: isinstance(x, LayerCache))


def _speculated(
    target,
    drafter,
    tokens,
    counts,
    cache,
    asked,
    *,
    slots: int,
    width: int,
    logprobs=None,
    poison: jax.Array | float = FAR,
):
    """`(the first token as it was written, the speculation after, what was written then)`."""
    batch = tokens.shape[0]
    state = poisoned(drafter.init(target, batch, slots), poison)
    nothing = jnp.zeros((batch, target.own_vocab), jnp.float32)
    history = jnp.zeros((batch, slots), jnp.int32)
    logits, cache, state, history = read_piece(
        target, drafter, tokens, counts, poisoned(cache, poison), nothing, state, history, fresh=True
    )
    controls, eos, seen = asked["controls"], asked["eos"], None
    if controls.penalty is not None:
        places = jnp.where(jnp.arange(tokens.shape[1]) < counts[:, None], tokens, target.spec.vocab)
        seen = jnp.zeros((batch, target.spec.vocab), bool)
        seen = seen.at[jnp.arange(batch)[:, None], places].set(True, mode="drop")
    last = jnp.take_along_axis(tokens, counts[:, None] - 1, axis=1)[:, 0]
    given = dict(last=last, limits=asked["limits"], seeds=asked["seeds"], eos=eos, controls=controls, seen=seen)
    rows, one = first(logits, cache, **given, vocab=target.spec.vocab, logprobs=logprobs)
    state = begin(rows, drafter, state, history)
    options = dict(steps=asked["steps"], eos=eos, controls=controls, costs=asked["costs"], halt=asked["halt"])
    state, written = decode(target, drafter, state, **options, width=width, logprobs=logprobs)
    return one, state, written


def speculation():
    """The program afresh: what is planted in the sources while it compiles is in it, and in no other."""

    def program(*args, **options):
        return _speculated(*args, **options)

    return jax.jit(program, static_argnames=("slots", "width", "logprobs"))


speculated = speculation()
plainly = jax.jit(generate, static_argnames=("max_new_tokens", "logprobs"))


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.asarray([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), counts.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, counts


class Task:
    """Prompts and how they are to be continued, plainly or with a drafter.

    cache: options of `CausalLM.init_cache`. most: the largest limit; programs are made for it.
    """

    def __init__(
        self,
        target,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        params: Sequence[SamplingParams] | SamplingParams | None = None,
        *,
        seeds: Sequence[int] | None = None,
        eos: Sequence[int] = (),
        logprobs: int | None = None,
        cache: dict | None = None,
        most: int = 24,
    ):
        self.target, self.prompts, self.rows, self.logprobs = target, prompts, len(prompts), logprobs
        self.tokens, self.counts = padded(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * self.rows
        self.controls = Controls.of(params)
        self.seeds = np.asarray(range(self.rows) if seeds is None else seeds, np.uint32)
        self.limits = np.asarray(limits, np.int32)
        self.eos = np.asarray([*eos, *[-1] * (2 - len(eos))], np.int32)
        self.most = most
        assert self.limits.max() <= self.most
        self.cache = cache or {}

    def new_cache(self, max_append: int = 1, spare: int = 0):
        capacity = int(self.tokens.shape[1]) + self.most + spare
        return self.target.init_cache(self.rows, capacity, max_append=max_append, **self.cache)

    @functools.cached_property
    def plain(self):
        """`Written` of plain decoding."""
        given = dict(limits=self.limits, seeds=self.seeds, eos=self.eos, controls=self.controls)
        _, written = plainly(
            self.target,
            self.tokens,
            self.counts,
            self.new_cache(),
            max_new_tokens=self.most,
            logprobs=self.logprobs,
            **given,
        )
        return jax.device_get(written)

    def drafted(
        self,
        drafter: Drafter,
        *,
        costs=None,
        steps: int | None = None,
        halt=None,
        poison: float = FAR,
        program=speculated,
    ):
        """`(the first token as written, the speculation after, what was written then)`."""
        asked = dict(limits=self.limits, seeds=self.seeds, eos=self.eos, controls=self.controls, costs=costs)
        asked["steps"] = np.int32(self.most if steps is None else steps)
        asked["halt"] = np.zeros(self.rows, bool) if halt is None else np.asarray(halt)
        spare = 0 if drafter.chain else drafter.nodes
        cache = self.new_cache(drafter.nodes + 1, spare)
        options = dict(slots=int(self.tokens.shape[1]) + self.most + 1, width=self.most, logprobs=self.logprobs)
        return jax.device_get(
            program(self.target, drafter, self.tokens, self.counts, cache, asked, poison=poison, **options)
        )


def rows_of(*parts, name: str = "tokens") -> list[list]:
    """Each row's entries, one written part after another."""
    rows = len(parts[0].counts)
    return [
        [x for part in parts for x in getattr(part, name)[row, : part.counts[row]].tolist()] for row in range(rows)
    ]


def hosted(runner: Runner, drafter: Drafter, prompts, limits, *, steps: int, costs: Costs | None = None, **options):
    """`(tokens of each row, the batch)` by way of the host, `steps` passes a call."""
    speculator = Speculator(runner, drafter, costs)
    tokens = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
    cache = runner.new_cache(len(prompts), tokens + speculator.spare, max_append=speculator.max_append)
    given = dict(limits=limits, params=[SamplingParams()] * len(prompts), seeds=[0] * len(prompts)) | options
    batch = speculator.begin(prompts, cache, **given)
    rows: list[list[int]] = [[] for _ in prompts]
    while True:
        for row, count in enumerate(batch.written.counts):
            rows[row] += batch.written.tokens[row, :count].tolist()
        if batch.finished.all():
            return rows, batch
        batch.advance(steps)
