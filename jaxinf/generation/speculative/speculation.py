"""B rows between two passes of the speculative loop, and what a pass writes down of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.loop import State, Written
from jaxinf.generation.speculative.accept import Accepted
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified
from jaxinf.generation.speculative.policy import Costs, Policy
from sharding import split_axis


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """What drafting came to, by row.

    passes: int32 `[B]`, passes of the target after the first token. plain: of these, without a draft.
    offered, accepted: int32 `[B, P - 1]`, passes in which the draft had a token so many places ahead and all before
      it stood, and in which it stood too.
    """

    passes: jax.Array
    plain: jax.Array
    offered: jax.Array
    accepted: jax.Array

    @classmethod
    def zeros(cls, batch: int, depth: int) -> Tally:
        def some(*shape: int) -> jax.Array:
            return jnp.zeros((batch, *shape), jnp.int32)

        return cls(some(), some(), some(depth), some(depth))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Speculation:
    """B rows between two passes. Donate it.

    rows: as in plain decoding; of `seen` and the like nothing differs.
    drafter: the drafter's state. history: int32 `[B, S]`, prompt and output, `rows.cache.lengths + 1` of them.
    """

    rows: State
    drafter: Any
    history: jax.Array
    policy: Policy
    tally: Tally

    @property
    def cache(self) -> Cache:
        return self.rows.cache

    @property
    def left(self) -> jax.Array:
        """int32 `[B]`: tokens that rows have yet to write; 0 of those that have ended."""
        return jnp.where(self.rows.finished, 0, self.rows.limits - self.rows.emitted)


def begin(rows: State, drafter: Drafter, state: Any, history: jax.Array) -> Speculation:
    """After the first token of each row, which `history` does not have yet. state: of the drafter."""
    batch = rows.tokens.shape[0]
    history = put_few(history, rows.cache.lengths, rows.tokens[:, None], jnp.ones_like(rows.tokens))
    policy = Policy.new(batch, drafter.depth, chain=drafter.chain, steps=drafter.steps)
    return Speculation(rows, state, history, policy, Tally.zeros(batch, drafter.depth))


def cut(accepted: Accepted, rows: State, eos: jax.Array) -> jax.Array:
    """int32 `[B]`, how many of the accepted tokens are emitted: up to a final one, or the limit."""
    final = jnp.any(accepted.tokens[:, :, None] == eos, axis=2)
    place = jnp.arange(final.shape[1])
    before = jnp.min(jnp.where(final, place + 1, final.shape[1]), axis=1)
    counts = jnp.minimum(jnp.minimum(accepted.counts, before), rows.limits - rows.emitted)
    return jnp.where(rows.finished, 0, counts).astype(jnp.int32)


def emit(
    state: Speculation, written: Written, verified: Verified, logits: jax.Array, eos: jax.Array
) -> tuple[Speculation, Written]:
    """Writes each row's tokens after those it has; the state with them, and with the cache of `verified`."""
    rows, counts, tokens = state.rows, verified.counts, verified.tokens

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        return put_few(buffer, written.counts, values, counts)

    last = jnp.maximum(counts - 1, 0)[:, None]
    latest = jnp.where(counts > 0, jnp.take_along_axis(tokens, last, 1)[:, 0], rows.tokens)
    emitted = rows.emitted + counts
    ended = jnp.any(latest[:, None] == eos, axis=1) & (counts > 0)
    finished = rows.finished | ended | (emitted >= rows.limits)
    after = dataclasses.replace(
        written, tokens=put(written.tokens, tokens), counts=written.counts + counts, finished=finished
    )
    if written.logprobs is not None:
        along = jnp.take_along_axis(logits, verified.path[:, :, None], axis=1)
        after = after.scored(split_axis.log_softmax(along), tokens, put)
    seen = rows.seen
    if seen is not None:
        own = split_axis.own_entries(tokens, seen.shape[1])
        meant = jnp.arange(tokens.shape[1]) < counts[:, None]
        lines = jnp.arange(tokens.shape[0])[:, None]
        seen = seen.at[lines, jnp.where(meant, own, seen.shape[1])].set(True, mode="drop")
    rows = dataclasses.replace(
        rows, cache=verified.cache, tokens=latest, emitted=emitted, finished=finished, seen=seen
    )
    history = put_few(state.history, verified.starts + 1, tokens, counts)
    return dataclasses.replace(state, rows=rows, history=history), after


def counted(
    state: Speculation, draft: Draft, accepted: Accepted, active: jax.Array, drafter: Drafter, costs: Costs | None
) -> tuple[Tally, Policy]:
    """The tally and the policy after a pass of so many accepted tokens, what was cut off at the end included."""
    stood = accepted.counts - 1
    reach = _reach(draft)
    place = jnp.arange(drafter.depth)
    offered = (place <= stood[:, None]) & (place < reach[:, None]) & active[:, None]
    held = (place < stood[:, None]) & active[:, None]
    tally = state.tally
    tally = dataclasses.replace(
        tally,
        passes=tally.passes + active,
        offered=tally.offered + offered,
        accepted=tally.accepted + held,
    )
    policy = state.policy
    if costs is not None:
        policy = policy.after_draft(costs, stood, reach, active, state.left)
    return tally, policy


def _reach(draft: Draft) -> jax.Array:
    """int32 `[B]`: how far ahead the longest branch goes."""
    return jnp.max(jnp.where(draft.follows >= 0, draft.depths[:, 1:], 0), axis=1)


def put_few(buffer: jax.Array, starts: jax.Array, values: jax.Array, counts: jax.Array) -> jax.Array:
    """`buffer [B, S, ...]` with row b's first `counts[b]` of a few `values [B, T, ...]` at `starts[b]`."""
    # One pass over the buffer, which fuses: a scatter is a loop over its indices, of several operations each.
    shape = buffer.shape[:2] + (1,) * (buffer.ndim - 2)
    place = (jnp.arange(buffer.shape[1]) - starts[:, None]).reshape(shape)
    many = counts.reshape(-1, *[1] * (buffer.ndim - 1))
    for t in range(values.shape[1]):
        buffer = jnp.where((place == t) & (t < many), values[:, t : t + 1], buffer)
    return buffer


def appended(history: jax.Array, starts: jax.Array, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """`history [B, S]` with row b's first `counts[b]` of `tokens [B, T]` at `starts[b]`."""
    place = jnp.arange(tokens.shape[1])
    at = jnp.where(place < counts[:, None], starts[:, None] + place, history.shape[1])
    return history.at[jnp.arange(history.shape[0])[:, None], at].set(tokens, mode="drop")
