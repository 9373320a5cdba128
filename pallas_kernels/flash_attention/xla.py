"""`flash_attention` for CPUs and GPUs: blocks of queries over blocks of keys (Dao et al. 2022, arXiv:2205.14135).

Memory is linear in the lengths, forward and backward. A table of live blocks, made from the mask rules before the
loops, says which key blocks each block of queries visits, so blocks that are hidden whole cost nothing.

Layout: q [B, K, G, T, D] with G query heads to a key head, so that K and V are never repeated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.tiles import (
    Plan,
    by_groups,
    cut,
    dot,
    for_platform,
    over_chunks,
    put,
    starts,
    tile,
    used_keys,
    visits,
)
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks
from pallas_kernels.masks import Rules

Pair = tuple[jax.Array, jax.Array]


def xla(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    rules: Rules,
) -> Pair:
    """The same maths, arguments and results as the reference."""
    batch, heads, queries, _ = q.shape
    q, sinks, slopes = by_groups(q, sinks, alibi_slopes, k.shape[1])
    results = (q.dtype, jnp.dtype(jnp.float32))
    out, lse = for_platform(plan, partial(_forward, plan), results, q, k, q, k, v, sinks, slopes, rules)
    return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)


def _forward(plan: Plan, blocks: XlaBlocks, q, k, v, sinks, slopes, rules: Rules) -> Pair:
    batch, groups, share = q.shape[:3]

    def step(chunk, totals):
        parts = _chunk(
            plan,
            blocks,
            chunk.of(q),
            chunk.of(k),
            chunk.of(v),
            chunk.of_heads(sinks),
            chunk.of_heads(slopes),
            chunk.rules(rules, share),
        )
        return tuple(chunk.put(whole, part) for whole, part in zip(totals, parts, strict=True))

    out = jnp.zeros((*q.shape[:4], v.shape[3]), q.dtype)
    return over_chunks(blocks, batch, groups, step, (out, jnp.zeros(out.shape[:4])))


def _chunk(plan: Plan, blocks: XlaBlocks, q, k, v, sinks, slopes, rules: Rules) -> Pair:
    """Some rows and key heads: block by block of queries."""
    q_count, q_starts = starts(rules.queries, blocks.q)
    k_count, k_starts = starts(rules.keys, blocks.kv)
    shape = (*q.shape[:3], blocks.q)

    def add(state, q_block, t, k_start, k_first):
        """One more block of keys: running maximum, sum and weighted values (Milakov and Gimelshein 2018)."""
        peak, total, acc = state
        s = k_start + jnp.arange(blocks.kv)
        fresh = (s >= k_first)[None] if rules.keys % blocks.kv else None
        this = tile(plan, q_block, cut(k, k_start, blocks.kv, 2), slopes, rules, t, s, fresh)
        new_peak = jnp.maximum(peak, this.scores.max(-1))
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights = jnp.exp(this.scores - base[..., None])
        fade = jnp.exp(peak - base)
        v_block = used_keys(this.seen, cut(v, k_start, blocks.kv, 2))
        acc = acc * fade[..., None] + dot("bkgts,bksd->bkgtd", weights, v_block)
        return new_peak, total * fade + weights.sum(-1), acc

    def rows(q_start: Any, fold: Callable) -> Pair:
        """Output and log-sum-exp of one block of queries; `fold` applies `add` for its blocks of keys."""
        if sinks is None:
            peak, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
        else:
            peak, total = jnp.broadcast_to(sinks[:, :, None], shape), jnp.ones(shape)
        state = (peak, total, jnp.zeros((*shape, v.shape[3])))
        t = q_start + jnp.arange(blocks.q)
        peak, total, acc = fold(partial(add, q_block=cut(q, q_start, blocks.q, 3), t=t), state)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return acc / total[..., None], jnp.where(some, peak + jnp.log(total), -jnp.inf)

    if q_count == k_count == 1:
        return rows(0, lambda add, state: add(state, k_start=0, k_first=0))
    visit, counts = visits(rules, blocks, by_keys=False)

    def block(i, results):
        def step(n, state, add):
            j = visit(i, n)
            return add(state, k_start=k_starts[j], k_first=j * blocks.kv)

        parts = rows(q_starts[i], lambda add, state: jax.lax.fori_loop(0, counts[i], partial(step, add=add), state))
        return tuple(put(whole, part, q_starts[i], 3) for whole, part in zip(results, parts, strict=True))

    out = jnp.zeros((*q.shape[:4], v.shape[3]), q.dtype)
    return jax.lax.fori_loop(0, q_count, block, (out, jnp.zeros(out.shape[:4])))
