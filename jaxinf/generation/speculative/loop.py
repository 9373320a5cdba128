"""The speculative loop on the device: draft, verify in one pass of the target, accept, take back, emit.

    while rows go on:
      g = how many tokens are worth drafting                      (policy.py; 0: a plain step)
      draft      = drafter.draft(...)                             nodes 1..N of a tree
      logits     = target(latest token, draft)                    one pass, T = N + 1 tokens a row
      path       = accept(draft, logits)                          accept.py
      cache      = lengths, or a branch of the tree, of what stays
      emit the target's tokens along the path, at least one a row

Each row accepts its own number of tokens. One program serves whatever is accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.loop import Written
from jaxinf.generation.sampling import Controls, Processor
from jaxinf.generation.speculative.accept import Judge, by_equality, by_rejection
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified, View
from jaxinf.generation.speculative.policy import Costs
from jaxinf.generation.speculative.speculation import Speculation, appended, counted, cut, emit
from jaxinf.models import CausalLM
from sharding import zigzag
from sharding.collectives import pmax
from sharding.rules import RULES


def read_piece(
    target: CausalLM,
    drafter: Drafter,
    tokens: jax.Array,
    counts: jax.Array,
    cache: Cache,
    logits: jax.Array,
    state: Any,
    history: jax.Array,
    *,
    fresh: bool,
) -> tuple[jax.Array, Cache, Any, jax.Array]:
    """`jaxinf.generation.loop.append_piece` that the drafter reads too: `(logits, cache, its state, history)`."""
    starts = cache.lengths
    hidden, after, _ = target.hidden(tokens, cache, counts=counts, fresh=fresh)
    assert after is not None
    state = drafter.read(target, state, tokens, counts, hidden, fresh=fresh)
    if zigzag.splits(tokens.shape[1], fresh):
        ends = zigzag.take_last(hidden, counts)
    else:
        ends = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    new = target.logits(ends)
    history = appended(history, starts, tokens, counts)
    return jnp.where((counts > 0)[:, None], new, logits), after, state, history


def decode(
    target: CausalLM,
    drafter: Drafter,
    state: Speculation,
    *,
    steps: jax.Array,
    eos: jax.Array,
    controls: Controls,
    costs: Costs | None = None,
    halt: jax.Array | None = None,
    width: int = 64,
    logprobs: int | None = None,
    processors: tuple[Processor, ...] = (),
) -> tuple[Speculation, Written]:
    """Up to `steps` passes, in one loop that ends early once every row has finished.

    Args:
      steps: int32 scalar, at most `width`.
      costs: what passes and drafts take, to draft as much as pays, or not at all; None: always draft in full.
      halt: bool `[B]`, rows to be finished before anything is written.
      width: static; `written` has room for so many tokens and those of one more pass.
      eos, controls, logprobs, processors: as for `jaxinf.generation.decode`.
    """
    room = width + drafter.depth + 1
    if halt is not None:
        rows = dataclasses.replace(state.rows, finished=state.rows.finished | halt)
        state = dataclasses.replace(state, rows=rows)
    options: dict[str, Any] = dict(eos=eos, controls=controls, processors=processors)
    target_graph, target_weights = nnx.split(target)
    drafter_weights, drafter_tree = jax.tree.flatten(drafter)

    def more(carry):
        return (carry[2] < steps) & carry[3]

    def going(state: Speculation, written: Written):
        batch = RULES["batch"]
        some = pmax(jnp.any(~state.rows.finished).astype(jnp.int32), *batch) > 0
        return some & (pmax(jnp.max(written.counts), *batch) <= width)

    def step(carry):
        state, written, done, _ = carry
        # Tied to the step, or XLA widens all 16-bit weights once before the loop and reads them at float32's cost.
        weights, done = jax.lax.optimization_barrier(((target_weights, drafter_weights), done))
        model = nnx.merge(target_graph, weights[0])
        helper = jax.tree.unflatten(drafter_tree, weights[1])

        def speculate(both, length, drafted=None):
            state, written = both
            return speculative_pass(model, helper, state, written, length, costs, drafted=drafted, **options)

        def plainly(both, drafted):
            state, written = both
            return plain_pass(model, helper, state, written, drafted=drafted, **options)

        both = (state, written)
        if costs is None:
            both = speculate(both, jnp.int32(drafter.depth))
        else:
            active = ~state.rows.finished
            length = state.policy.length(costs, state.left)
            drafted = None
            if drafter.free:
                view = view_of(state, length, controls, processors)
                drafted, _, _ = helper.draft(model, state.drafter, view)
                some = jnp.any((drafted.follows >= 0) & active[:, None]).astype(jnp.int32)
                length = jnp.where((pmax(some, *RULES["batch"]) > 0) | (costs.verify <= 0), length, 0)
            # Loops of one trip or none: a `cond` would copy the caches.
            both = _if(length > 0, lambda both: speculate(both, length, drafted), both)
            both = _if(length == 0, lambda both: plainly(both, drafted), both)
        state, written = both
        return state, written, done + 1, going(state, written)

    written = Written.empty(state.rows, room, logprobs)
    start = (state, written, jnp.int32(0), going(state, written))
    state, written, *_ = jax.lax.while_loop(more, step, start)
    return state, written


def speculative_pass(
    target: CausalLM,
    drafter: Drafter,
    state: Speculation,
    written: Written,
    length: jax.Array,
    costs: Costs | None,
    *,
    eos: jax.Array,
    controls: Controls,
    processors: tuple[Processor, ...],
    drafted: Draft | None = None,
) -> tuple[Speculation, Written]:
    """Drafts `length` tokens in a row, at least 1, and verifies them. drafted: if that was done already."""
    rows = state.rows
    active = ~rows.finished
    if drafted is None:
        view = view_of(state, length, controls, processors)
        draft, drafter_state, cache = drafter.draft(target, state.drafter, view)
    else:
        draft, drafter_state, cache = drafted, state.drafter, rows.cache
    state = dataclasses.replace(state, drafter=drafter_state, rows=dataclasses.replace(rows, cache=cache))
    room = rows.limits - rows.emitted - 1  # what is past it would not be emitted, and has no slots
    batch, nodes = draft.tokens.shape
    if drafter.chain:
        given = jnp.full((batch,), nodes) if draft.counts is None else draft.counts
        draft = dataclasses.replace(draft, counts=jnp.where(active, jnp.clip(room, 0, given), 0))
        counts = jnp.sum(draft.meant, axis=1, dtype=jnp.int32) + active
    else:
        counts = jnp.where(active, nodes + 1, 0)

    hidden, cache, _ = target.hidden(
        jnp.concatenate([rows.tokens[:, None], draft.tokens], axis=1), cache, counts=counts, tree=draft.mask
    )
    assert cache is not None
    logits = target.logits(hidden)
    judge = Judge(rows.emitted, rows.seeds, rows.tokens, controls, rows.seen, rows.vocab, processors)
    rule = drafter.rule or (by_equality if draft.probs is None else by_rejection)
    accepted = rule(judge, draft, logits, drafter.depth)
    counts = cut(accepted, rows, eos)
    starts = rows.cache.lengths
    if drafter.chain:
        cache = cache.roll_back(starts + counts)
    else:
        cache = dataclasses.replace(cache, lengths=starts).commit(accepted.path, counts)
    verified = Verified(
        draft, accepted.path, counts, accepted.tokens, accepted.choices, hidden, cache, state.history, starts
    )
    state, written = emit(state, written, verified, logits, eos)
    tally, policy = counted(state, draft, accepted, active, drafter, costs)
    state = dataclasses.replace(state, tally=tally, policy=policy)
    after = dataclasses.replace(verified, history=state.history)
    return dataclasses.replace(state, drafter=drafter.commit(target, state.drafter, after)), written


def plain_pass(
    target: CausalLM,
    drafter: Drafter,
    state: Speculation,
    written: Written,
    *,
    eos: jax.Array,
    controls: Controls,
    processors: tuple[Processor, ...],
    drafted: Draft | None = None,
) -> tuple[Speculation, Written]:
    """One token a row, as plain decoding has it. drafted: what was not worth verifying, by which the policy learns
    whether it would have stood."""
    rows = state.rows
    active = ~rows.finished
    starts = rows.cache.lengths
    hidden, cache, _ = target.hidden(rows.tokens[:, None], rows.cache, counts=active.astype(jnp.int32))
    assert cache is not None
    logits = target.logits(hidden)
    judge = Judge(rows.emitted, rows.seeds, rows.tokens, controls, rows.seen, rows.vocab, processors)
    nothing = Draft(jnp.zeros((rows.tokens.shape[0], 0), jnp.int32))
    accepted = by_equality(judge, nothing, logits, 0)
    counts = active.astype(jnp.int32)
    verified = Verified(
        None, accepted.path, counts, accepted.tokens, accepted.choices, hidden, cache, state.history, starts
    )
    state, written = emit(state, written, verified, logits, eos)
    tally = dataclasses.replace(state.tally, passes=state.tally.passes + counts, plain=state.tally.plain + counts)
    offered = stands = None
    if drafted is not None and drafter.chain:
        offered = active & (drafted.follows[:, 0] == 0)
        stands = drafted.tokens[:, 0] == accepted.tokens[:, 0]
    state = dataclasses.replace(state, tally=tally, policy=state.policy.after_plain(offered, stands))
    after = dataclasses.replace(verified, history=state.history)
    return dataclasses.replace(state, drafter=drafter.commit(target, state.drafter, after)), written


def view_of(state: Speculation, length: jax.Array, controls: Controls, processors: tuple[Processor, ...]) -> View:
    rows = state.rows
    return View(
        cache=rows.cache,
        tokens=rows.tokens,
        emitted=rows.emitted,
        active=~rows.finished,
        history=state.history,
        length=length,
        seeds=rows.seeds,
        controls=controls,
        seen=rows.seen,
        vocab=rows.vocab,
        processors=processors,
    )


def _if(holds: jax.Array, change: Callable[[Any], Any], carry: Any) -> Any:
    """`change(carry)` where `holds`, else `carry`, without a copy of it."""

    def once(both):
        return jnp.zeros((), bool), change(both[1])

    return jax.lax.while_loop(lambda both: both[0], once, (holds, carry))[1]
