"""Gradients of `flash_attention`, block by block: scores are made again from the saved log-sum-exp.

Dao et al. 2022 (arXiv:2205.14135), algorithm 4, extended to a cotangent of the log-sum-exp, softcap, sinks, ALiBi.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.tiles import (
    Plan,
    add_at,
    by_groups,
    cut,
    dot,
    for_platform,
    over_chunks,
    starts,
    tile,
    used_keys,
    used_queries,
    visits,
)
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks
from pallas_kernels.masks import Rules


def backward(plan: Plan, saved, cotangents):
    """Gradients in q, k, v, sinks and slopes (and None for the rules); saved: these, the rules, out and lse."""
    q, k, v, sinks, slopes, rules, out, lse = saved
    groups = k.shape[1]
    wide = q.shape
    q, sinks, slopes = by_groups(q, sinks, slopes, groups)
    out, lse, d_out, d_lse = (by_groups(x, None, None, groups)[0] for x in (out, lse, *cotangents))
    # d lse / d score is the probability too, so both cotangents enter as one number for each query.
    inner = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    base = jnp.where(lse == -jnp.inf, 0.0, lse)
    results = (q.dtype, k.dtype, v.dtype, None if slopes is None else slopes.dtype)
    d_q, d_k, d_v, d_slopes = for_platform(
        plan, partial(_gradients, plan), results, q, k, q, k, v, slopes, rules, d_out, base, inner
    )
    d_sinks = None
    if sinks is not None:
        d_sinks = jnp.sum(jnp.exp(sinks[:, :, None] - base) * inner, (0, 3)).reshape(-1)
    return d_q.reshape(wide), d_k, d_v, d_sinks, None if d_slopes is None else d_slopes.reshape(-1), None


def _gradients(plan: Plan, blocks: XlaBlocks, q, k, v, slopes, rules: Rules, d_out, base, inner):
    batch, groups, share = q.shape[:3]

    def step(chunk, totals):
        *wholes, d_slopes = totals
        *parts, d_slopes_part = _chunk(
            plan,
            blocks,
            chunk.of(q),
            chunk.of(k),
            chunk.of(v),
            chunk.of_heads(slopes),
            chunk.rules(rules, share),
            chunk.of(d_out),
            chunk.of(base),
            chunk.of(inner),
        )
        if d_slopes is not None:
            assert d_slopes_part is not None
            d_slopes = add_at(d_slopes, d_slopes_part, chunk.head, 0)
        return *(chunk.put(*pair) for pair in zip(wholes, parts, strict=True)), d_slopes

    zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in (q, k, v))
    return over_chunks(blocks, batch, groups, step, (*zeros, _zeros_like(slopes)))


def _zeros_like(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.zeros(x.shape, jnp.float32)


def _chunk(plan: Plan, blocks: XlaBlocks, q, k, v, slopes, rules: Rules, d_out, base, inner):
    """Some rows and key heads: block by block of keys; d_q gathers in float32 meanwhile."""
    q_count, q_starts = starts(rules.queries, blocks.q)
    k_count, k_starts = starts(rules.keys, blocks.kv)

    def pair(q_start, q_first, k_start, k_first, k_block, v_block):
        t, s = q_start + jnp.arange(blocks.q), k_start + jnp.arange(blocks.kv)
        fresh = None
        if rules.keys % blocks.kv or rules.queries % blocks.q:
            fresh = (t >= q_first)[:, None] & (s >= k_first)[None]
        q_block, d_block, base_block, inner_block = (cut(x, q_start, blocks.q, 3) for x in (q, d_out, base, inner))
        this = tile(plan, q_block, k_block, slopes, rules, t, s, fresh, gradient=True)
        seen = this.seen
        d_block = used_queries(seen, d_block)
        weights = jnp.exp(this.scores - base_block[..., None])
        d_weights = dot("bkgtd,bksd->bkgts", d_block, used_keys(seen, v_block))
        d_scores = weights * (d_weights + inner_block[..., None])
        if seen is not None:
            d_scores = jnp.where(seen, d_scores, 0.0)
        d_slopes = None if this.distance is None else jnp.sum(d_scores * this.distance, (0, 3, 4))
        if this.slope is not None:
            slope = this.slope if seen is None else jnp.where(seen, this.slope, 0.0)
            d_scores *= slope
        d_scores *= plan.scale
        return (
            dot("bkgts,bksd->bkgtd", d_scores, used_keys(seen, k_block)),
            dot("bkgts,bkgtd->bksd", d_scores, used_queries(seen, q_block)),
            dot("bkgts,bkgtd->bksd", weights, d_block),
            d_slopes,
        )

    if q_count == k_count == 1:
        return pair(0, 0, 0, 0, k, v)
    visit, counts = visits(rules, blocks, by_keys=True)

    def column(j, totals):
        d_q, d_k, d_v, d_slopes = totals
        start = k_starts[j]
        k_block, v_block = (cut(x, start, blocks.kv, 2) for x in (k, v))

        def step(n, state):
            i = visit(j, n)
            d_q, *sums = state
            d_q_block, *parts = pair(q_starts[i], i * blocks.q, start, j * blocks.kv, k_block, v_block)
            sums = tuple(None if total is None else total + part for total, part in zip(sums, parts, strict=True))
            return add_at(d_q, d_q_block, q_starts[i], 3), *sums

        state = (d_q, _zeros_like(k_block), _zeros_like(v_block), d_slopes)
        d_q, d_k_block, d_v_block, d_slopes = jax.lax.fori_loop(0, counts[j], step, state)
        return d_q, add_at(d_k, d_k_block, start, 2), add_at(d_v, d_v_block, start, 2), d_slopes

    totals = (*(_zeros_like(x) for x in (q, k, v)), _zeros_like(slopes))
    return jax.lax.fori_loop(0, k_count, column, totals)
