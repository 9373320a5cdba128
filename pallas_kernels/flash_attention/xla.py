"""`flash_attention` for CPUs and GPUs: blocks of queries over blocks of keys (Dao et al. 2022, arXiv:2205.14135).

Memory is linear in the lengths, forward and backward. A table of live blocks, made from the mask rules before the
loops, gives each block of queries the list of key blocks to visit, so hidden blocks cost nothing.

Layout: q [B, K, G, T, D] with G query heads to a key head, so that K and V are never repeated.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.blocks import Blocks, default_blocks
from pallas_kernels.masks import Rules, distances, live_blocks, visible

Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Plan:
    """What is fixed while tracing."""

    scale: float
    softcap: float | None
    blocks: Blocks


def xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    rules: Rules,
    *,
    scale: float,
    softcap: float | None,
    blocks: Blocks | None = None,
) -> Pair:
    """The same maths, arguments and results as the reference; differentiable in q, k, v, sinks and slopes."""
    batch, heads, queries, dim = q.shape
    groups, keys = k.shape[1:3]
    blocks = blocks or default_blocks(batch * heads, queries, keys)
    plan = Plan(scale, softcap, Blocks(min(blocks.q, queries), min(blocks.kv, keys)))
    q = q.reshape(batch, groups, heads // groups, queries, dim)
    sinks, alibi_slopes = (None if x is None else x.reshape(groups, heads // groups) for x in (sinks, alibi_slopes))
    out, lse = _attention(plan, q, k, v, sinks, alibi_slopes, rules)
    return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q, k, v, sinks, slopes, rules) -> Pair:
    return _forward(plan, q, k, v, sinks, slopes, rules)


def _save(plan: Plan, q, k, v, sinks, slopes, rules):
    out, lse = _forward(plan, q, k, v, sinks, slopes, rules)
    return (out, lse), (q, k, v, sinks, slopes, rules, out, lse)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum accumulated in float32, with float32 operands at full precision."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _starts(length: int, block: int) -> tuple[int, jax.Array]:
    """Number of blocks and where each starts; the last one is moved back to end at the end."""
    count = max(1, -(-length // block))
    return count, jnp.minimum(jnp.arange(count) * block, length - block)


def _cut(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _grouped(seen: jax.Array, groups: int) -> jax.Array:
    """[B | 1, N | 1, q, k] -> [B | 1, K | 1, G | 1, q, k]."""
    rows, heads = seen.shape[:2]
    shape = (rows, 1, 1) if heads == 1 else (rows, groups, heads // groups)
    return seen.reshape(*shape, *seen.shape[2:])


def _visits(live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row of a table of live blocks, the order in which to visit them and how many there are."""
    return jnp.argsort(~live, axis=1, stable=True), live.sum(1)


@dataclass(frozen=True)
class Tile:
    """One block of queries against one block of keys."""

    scores: jax.Array  # float32 [B, K, G, q, k], -inf where hidden
    seen: jax.Array | None  # bool, broadcastable to scores
    slope: jax.Array | None  # d score / d (scaled dot product)
    distance: jax.Array | None  # float32 [B | 1, 1, 1, q, k], with ALiBi


def _tile(plan: Plan, q, k, slopes, rules: Rules, t: jax.Array, s: jax.Array, first: Any, grad=False) -> Tile:
    """q [B, K, G, q, D] at the queries t, k [B, K, k, D] at the keys s; keys before `first` were seen already."""
    x = plan.scale * _dot("bkgtd,bksd->bkgts", q, k)
    slope = None
    if plan.softcap is not None:
        tanh = jnp.tanh(x / plan.softcap)
        x = plan.softcap * tanh
        slope = 1 - tanh * tanh if grad else None
    distance = None
    if slopes is not None:
        distance = distances(rules, t, s[None])[:, None, None].astype(jnp.float32)
        x += slopes[:, :, None, None] * distance
    seen = visible(rules, t, s)
    if seen is not None:
        seen = _grouped(seen, k.shape[1])
    if rules.keys % plan.blocks.kv:
        fresh = s >= first
        seen = fresh[None, None, None, None] if seen is None else seen & fresh
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)
    return Tile(x, seen, slope, distance)


def _used_keys(seen: jax.Array | None, x: jax.Array) -> jax.Array:
    """x [B, K, k, D] with rows that no query of the tile sees set to 0: they may hold nan."""
    return x if seen is None else jnp.where(seen.any((2, 3))[..., None], x, 0)


def _used_queries(seen: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if seen is None else jnp.where(seen.any(4)[..., None], x, 0)


def _forward(plan: Plan, q, k, v, sinks, slopes, rules: Rules) -> Pair:
    batch, groups, share, queries, _ = q.shape
    keys = k.shape[2]
    q_size, k_size = plan.blocks.q, plan.blocks.kv
    q_count, q_starts = _starts(queries, q_size)
    k_count, k_starts = _starts(keys, k_size)
    shape = (batch, groups, share, q_size)

    def add(state, q_block, t, k_start, k_first):
        """One more block of keys: running maximum, sum and weighted values (Milakov and Gimelshein 2018)."""
        peak, total, acc = state
        s = k_start + jnp.arange(k_size)
        k_block, v_block = (_cut(x, k_start, k_size, 2) for x in (k, v))
        tile = _tile(plan, q_block, k_block, slopes, rules, t, s, k_first)
        new_peak = jnp.maximum(peak, tile.scores.max(-1))
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights = jnp.exp(tile.scores - base[..., None])
        fade = jnp.exp(peak - base)
        acc = acc * fade[..., None] + _dot("bkgts,bksd->bkgtd", weights, _used_keys(tile.seen, v_block))
        return new_peak, total * fade + weights.sum(-1), acc

    def rows(q_start, visit):
        """Output and log-sum-exp of one block of queries; visit folds `add` over its blocks of keys."""
        if sinks is None:
            peak, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
        else:
            peak, total = jnp.broadcast_to(sinks[:, :, None], shape), jnp.ones(shape)
        state = (peak, total, jnp.zeros((*shape, v.shape[3])))
        t = q_start + jnp.arange(q_size)
        peak, total, acc = visit(partial(add, q_block=_cut(q, q_start, q_size, 3), t=t), state)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return (acc / total[..., None]).astype(q.dtype), jnp.where(some, peak + jnp.log(total), -jnp.inf)

    if q_count == k_count == 1:
        return rows(0, lambda add, state: add(state, k_start=0, k_first=0))
    order, counts = _visits(live_blocks(rules, q_starts, q_size, k_starts, k_size))

    def block(i, results):
        def visit(add, state):
            def step(n, state):
                j = order[i, n]
                return add(state, k_start=k_starts[j], k_first=j * k_size)

            return jax.lax.fori_loop(0, counts[i], step, state)

        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, q_starts[i], 3)
            for whole, part in zip(results, rows(q_starts[i], visit), strict=True)
        )

    out = jnp.zeros((batch, groups, share, queries, v.shape[3]), q.dtype)
    return jax.lax.fori_loop(0, q_count, block, (out, jnp.zeros(out.shape[:4])))


def _backward(plan: Plan, saved, cotangents):
    """Dao et al. 2022, algorithm 4: scores are made again from the saved log-sum-exp."""
    q, k, v, sinks, slopes, rules, out, lse = saved
    d_out, d_lse = cotangents
    queries, keys = q.shape[3], k.shape[2]
    q_size, k_size = plan.blocks.q, plan.blocks.kv
    q_count, q_starts = _starts(queries, q_size)
    k_count, k_starts = _starts(keys, k_size)
    # d lse / d score is the probability too, so both cotangents enter as one number for each query.
    inner = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    base = jnp.where(lse == -jnp.inf, 0.0, lse)

    def pair(q_start, q_first, k_start, k_first, k_block, v_block):
        t, s = q_start + jnp.arange(q_size), k_start + jnp.arange(k_size)
        q_block, d_block, base_block, inner_block = (_cut(x, q_start, q_size, 3) for x in (q, d_out, base, inner))
        tile = _tile(plan, q_block, k_block, slopes, rules, t, s, k_first, grad=True)
        seen = tile.seen
        if queries % q_size:
            fresh = (t >= q_first)[None, None, None, :, None]
            seen = jnp.broadcast_to(fresh, (1, 1, 1, q_size, k_size)) if seen is None else seen & fresh
        weights = jnp.exp(tile.scores - base_block[..., None])
        d_block = _used_queries(seen, d_block)
        d_weights = _dot("bkgtd,bksd->bkgts", d_block, _used_keys(seen, v_block))
        d_scores = weights * (d_weights + inner_block[..., None])
        if seen is not None:
            weights = jnp.where(seen, weights, 0.0)
            d_scores = jnp.where(seen, d_scores, 0.0)
        d_slopes = None if tile.distance is None else jnp.sum(d_scores * tile.distance, (0, 3, 4))
        if tile.slope is not None:
            d_scores *= jnp.where(d_scores == 0, 0.0, tile.slope)
        d_scores *= plan.scale
        return (
            _dot("bkgts,bksd->bkgtd", d_scores, _used_keys(seen, k_block)),
            _dot("bkgts,bkgtd->bksd", d_scores, _used_queries(seen, q_block)),
            _dot("bkgts,bkgtd->bksd", weights, d_block),
            d_slopes,
        )

    if q_count == k_count == 1:
        d_q, d_k, d_v, d_slopes = pair(0, 0, 0, 0, k, v)
    else:
        order, counts = _visits(live_blocks(rules, q_starts, q_size, k_starts, k_size).T)

        def column(j, totals):
            d_q, d_k, d_v, d_slopes = totals
            start = k_starts[j]
            k_block, v_block = (_cut(x, start, k_size, 2) for x in (k, v))

            def step(n, state):
                d_q, d_k_block, d_v_block, d_slopes = state
                i = order[j, n]
                a, b, c, d = pair(q_starts[i], i * q_size, start, j * k_size, k_block, v_block)
                d_q = _add_at(d_q, a, q_starts[i], 3)
                return d_q, d_k_block + b, d_v_block + c, None if d is None else d_slopes + d

            zeros = (jnp.zeros(k_block.shape, jnp.float32), jnp.zeros(v_block.shape, jnp.float32))
            d_q, d_k_block, d_v_block, d_slopes = jax.lax.fori_loop(0, counts[j], step, (d_q, *zeros, d_slopes))
            return d_q, _add_at(d_k, d_k_block, start, 2), _add_at(d_v, d_v_block, start, 2), d_slopes

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
        d_slopes = None if slopes is None else jnp.zeros(slopes.shape)
        d_q, d_k, d_v, d_slopes = jax.lax.fori_loop(0, k_count, column, (*zeros, d_slopes))
    d_sinks = None
    if sinks is not None:
        d_sinks = jnp.sum(jnp.exp(sinks[:, :, None] - base) * inner, (0, 3))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_sinks, d_slopes, None


def _add_at(whole: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis)


_attention.defvjp(_save, _backward)
