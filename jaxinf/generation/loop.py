"""The decode loop on the device: one `while_loop` in one program, its state one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.sampling import Context, Controls, Processor, row_keys, sample
from jaxinf.generation.step import decode_step, prefill
from jaxinf.models import CausalLM
from sharding import split_axis, zigzag
from sharding.collectives import pmax
from sharding.rules import RULES

PIECE = 512
"""Tokens of a long prompt that one pass takes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """B rows between two tokens. Donate it: the cache is written in place.

    cache: everything but each row's latest token.
    tokens: int32 `[B]`, each row's latest token, emitted but not in the cache.
    emitted: int32 `[B]`, new tokens so far. limits: int32 `[B]`, where it stops.
    finished: bool `[B]`; such a row writes nothing more, neither tokens nor keys.
    seeds: uint32 `[B]`; token t of a row draws with `fold_in(key(seed), t)`.
    seen: bool `[B, V]`, tokens of the prompt and the output; None unless the repetition penalty is used.
    vocab: static, V; None: as many as the logits have. A mesh splits V, and may have padded it.
    """

    cache: Cache
    tokens: jax.Array
    emitted: jax.Array
    limits: jax.Array
    finished: jax.Array
    seeds: jax.Array
    seen: jax.Array | None = None
    vocab: int | None = dataclasses.field(default=None, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """What one call wrote: row b's new tokens are `tokens[b, :counts[b]]`.

    tokens: int32 `[B, W]`. counts: int32 `[B]`. finished: bool `[B]`, as in the state.
    logprobs: float32 `[B, W]`, log-softmax of the model's own logits (before `process`) at the tokens; or None.
    top_ids, top_logprobs: int32 and float32 `[B, W, K]`, the K most likely tokens, best first; or None.
    """

    tokens: jax.Array
    counts: jax.Array
    finished: jax.Array
    logprobs: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None

    @classmethod
    def empty(cls, state: State, width: int, logprobs: int | None) -> Written:
        """Room for `width` tokens a row; `logprobs`: how many alternatives to keep, None: no log-probabilities."""
        batch = state.tokens.shape[0]

        def zeros(*shape, dtype=jnp.float32):
            return jnp.zeros((batch, *shape), dtype)

        return cls(
            tokens=zeros(width, dtype=jnp.int32),
            counts=zeros(dtype=jnp.int32),
            finished=state.finished,
            logprobs=None if logprobs is None else zeros(width),
            top_ids=zeros(width, logprobs, dtype=jnp.int32) if logprobs else None,
            top_logprobs=zeros(width, logprobs) if logprobs else None,
        )

    def scored(
        self, scores: jax.Array, tokens: jax.Array, put: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> Written:
        """With what is kept of log-probabilities `scores [..., V]` of `tokens [...]`, as `put(buffer, values)`
        writes it; for those that keep them."""
        assert self.logprobs is not None
        new = dataclasses.replace(self, logprobs=put(self.logprobs, split_axis.take(scores, tokens)))
        if self.top_ids is None or self.top_logprobs is None:
            return new
        values, ids = split_axis.top_k(scores, self.top_ids.shape[-1])
        return dataclasses.replace(new, top_ids=put(self.top_ids, ids), top_logprobs=put(self.top_logprobs, values))


def append_piece(
    model: CausalLM, tokens: jax.Array, counts: jax.Array, cache: Cache, logits: jax.Array, *, fresh: bool
) -> tuple[jax.Array, Cache]:
    """`prefill` of one piece of the prompts; rows whose prompt is over (`counts[b] == 0`) keep their `logits`."""
    new, cache = prefill(model, tokens, counts, cache, fresh=fresh)
    return jnp.where((counts > 0)[:, None], new, logits), cache


def first(
    logits: jax.Array,
    cache: Cache,
    *,
    last: jax.Array,
    limits: jax.Array,
    seeds: jax.Array,
    eos: jax.Array,
    controls: Controls,
    seen: jax.Array | None = None,
    vocab: int | None = None,
    logprobs: int | None = None,
    processors: Sequence[Processor] = (),
) -> tuple[State, Written]:
    """The first token of each row from the logits after its prompt.

    Args:
      logits: float32 `[B, V]`; cache: with the prompts in it.
      last: int32 `[B]`, last tokens of the prompts.
      limits: int32 `[B]`, new tokens at most, at least 1.
      seeds: uint32 `[B]`. eos: int32 `[E]`, ids that end a row; entries of -1 are none.
      seen: bool `[B, V]`, tokens of the prompts; needed by the repetition penalty.
      vocab: static; as in `State`.
      logprobs: static; as in `Written.empty`. processors: static.
    """
    batch = logits.shape[0]
    none = jnp.zeros((batch,), jnp.int32)
    state = State(cache, last, none, limits, jnp.zeros((batch,), bool), seeds, seen, vocab)
    return _emit(logits, state, Written.empty(state, 1, logprobs), jnp.int32(0), eos, controls, processors)


def decode(
    model: CausalLM,
    state: State,
    *,
    steps: jax.Array,
    eos: jax.Array,
    controls: Controls,
    halt: jax.Array | None = None,
    width: int = 64,
    logprobs: int | None = None,
    processors: Sequence[Processor] = (),
) -> tuple[State, Written]:
    """Up to `steps` more tokens a row, in one loop that ends early once every row has finished.

    Args:
      steps: int32 scalar, at most `width`; other values need no new program.
      halt: bool `[B]`, rows to be finished before anything is written (a stop string was found, say).
      width: static, room for tokens. The others are as for `first`.
    """
    if halt is not None:
        state = dataclasses.replace(state, finished=state.finished | halt)

    def more(carry):
        _, _, column, going = carry
        return (column < jnp.minimum(steps, width)) & going

    def going(state):
        # Chips with other rows too: a loop that is not the same on all of them would wait for ever.
        return pmax(jnp.any(~state.finished).astype(jnp.int32), *RULES["batch"]) > 0

    def step(carry):
        state, written, column, _ = carry
        active = (~state.finished).astype(jnp.int32)
        # Tied to the step, or XLA widens all 16-bit weights once before the loop and reads them at float32's cost.
        fenced, column = jax.lax.optimization_barrier((weights, column))
        logits, cache = decode_step(nnx.merge(graph, fenced), state.tokens, state.cache, counts=active)
        state = dataclasses.replace(state, cache=cache)
        state, written = _emit(logits, state, written, column, eos, controls, processors)
        return state, written, column + 1, going(state)

    graph, weights = nnx.split(model)
    start = (state, Written.empty(state, width, logprobs), jnp.int32(0), going(state))
    state, written, *_ = jax.lax.while_loop(more, step, start)
    return state, written


def generate(
    model: CausalLM,
    tokens: jax.Array,
    counts: jax.Array,
    cache: Cache,
    *,
    max_new_tokens: int,
    limits: jax.Array | None = None,
    seeds: jax.Array | None = None,
    eos: jax.Array | None = None,
    controls: Controls | None = None,
    logprobs: int | None = None,
    processors: Sequence[Processor] = (),
    piece: int = PIECE,
) -> tuple[State, Written]:
    """Prefill and decode of whole prompts as one traceable function, for those who jit their own.

    Args:
      model: jit with it as an argument, and donate the cache.
      tokens: int32 `[B, T]`, padded on the right; counts: int32 `[B]`, 1 to T.
      cache: empty, with room for `counts + max_new_tokens - 1` tokens a row.
      max_new_tokens: static. limits: int32 `[B]`, 1 to max_new_tokens; None: that for all.
      seeds: uint32 `[B]`; None: 0. eos: int32 `[E]`; None: rows run to their limits.
      controls: None: greedy.
      piece: static; longer prompts are taken in pieces of this many tokens, unless a rope needs them whole or the
        program has a `sequence` axis, over which they are split.

    Returns:
      `(state, written)`; row b's new tokens are `written.tokens[b, :written.counts[b]]`.
    """
    batch, total = tokens.shape
    # A pass that begins its rows is split over `sequence`; later pieces are not.
    piece = total if model.spec.reads_prompts_whole or zigzag.splits(total, True) else piece
    controls = Controls() if controls is None else controls
    limits = jnp.full((batch,), max_new_tokens, jnp.int32) if limits is None else limits
    seeds = jnp.zeros((batch,), jnp.uint32) if seeds is None else seeds
    eos = jnp.full((1,), -1, jnp.int32) if eos is None else eos

    nothing = jnp.zeros((batch, model.own_vocab), jnp.float32)
    head = jnp.minimum(counts, piece)
    logits, cache = append_piece(model, tokens[:, :piece], head, cache, nothing, fresh=True)
    if total > piece:
        padded = jnp.pad(tokens, ((0, 0), (0, -total % piece)))

        def body(i, carry):
            logits, cache = carry
            part = jax.lax.dynamic_slice_in_dim(padded, i * piece, piece, axis=1)
            left = jnp.clip(counts - i * piece, 0, piece)
            return append_piece(model, part, left, cache, logits, fresh=False)

        pieces = (pmax(jnp.max(counts), *RULES["batch"]) + piece - 1) // piece
        logits, cache = jax.lax.fori_loop(1, pieces, body, (logits, cache))

    seen = None
    if controls.penalty is not None:
        real = jnp.arange(total)[None] < counts[:, None]
        places = split_axis.own_entries(tokens, model.own_vocab)
        places = jnp.where(real, places, model.own_vocab)
        seen = jnp.zeros((batch, model.own_vocab), bool)
        seen = seen.at[jnp.arange(batch)[:, None], places].set(True, mode="drop")
    last = jnp.take_along_axis(tokens, counts[:, None] - 1, axis=1)[:, 0]
    options: Any = dict(eos=eos, controls=controls, logprobs=logprobs, processors=processors)
    own: Any = dict(last=last, limits=limits, seeds=seeds, seen=seen, vocab=model.spec.vocab)
    state, one = first(logits, cache, **own, **options)
    if max_new_tokens == 1:
        return state, one
    rest = max_new_tokens - 1
    state, more = decode(model, state, steps=jnp.int32(rest), width=rest, **options)

    def join(a, b) -> Any:
        return None if a is None else jnp.concatenate([a, b], axis=1)

    return state, Written(
        join(one.tokens, more.tokens),
        one.counts + more.counts,
        more.finished,
        join(one.logprobs, more.logprobs),
        join(one.top_ids, more.top_ids),
        join(one.top_logprobs, more.top_logprobs),
    )


def _emit(
    logits: jax.Array,
    state: State,
    written: Written,
    column: jax.Array,
    eos: jax.Array,
    controls: Controls,
    processors: Sequence[Processor],
) -> tuple[State, Written]:
    """Draws a token for each unfinished row and writes it to `column`."""
    context = Context(state.tokens, state.emitted, state.seen, state.vocab)
    keys = row_keys(state.seeds, state.emitted)
    token = sample(logits, controls, keys, context=context, processors=processors)
    token = jnp.where(state.finished, state.tokens, token)
    active = (~state.finished).astype(jnp.int32)
    emitted = state.emitted + active
    finished = state.finished | jnp.any(token[:, None] == eos[None], axis=1) | (emitted >= state.limits)

    def put(buffer, value):
        return jax.lax.dynamic_update_index_in_dim(buffer, value, column, axis=1)

    after = dataclasses.replace(
        written, tokens=put(written.tokens, token), counts=written.counts + active, finished=finished
    )
    if written.logprobs is not None:
        after = after.scored(split_axis.log_softmax(logits), token, put)
    seen = state.seen
    if seen is not None:
        own = split_axis.own_entries(token, seen.shape[1])
        seen = seen.at[jnp.arange(token.shape[0]), own].set(True, mode="drop")
    state = dataclasses.replace(state, tokens=token, emitted=emitted, finished=finished, seen=seen)
    return state, after
