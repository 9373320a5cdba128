"""One block of queries against one block of keys: what the forward and the backward pass share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.xla_blocks import XlaBlocks, default_blocks
from pallas_kernels.masks import Rules, distances, live_blocks, take, visible


@dataclass(frozen=True)
class Plan:
    """What is fixed while tracing. `blocks` of None are chosen for the platform that is lowered for."""

    scale: float
    softcap: float | None
    blocks: XlaBlocks | None


def by_groups(
    q: jax.Array, sinks: jax.Array | None, slopes: jax.Array | None, groups: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """q [B, N, ...] as [B, K, G, ...], what is [N] as [K, G]: G query heads to each of K key heads."""
    batch, heads = q.shape[:2]
    shape = (groups, heads // groups)
    sinks, slopes = (None if x is None else x.reshape(shape) for x in (sinks, slopes))
    return q.reshape(batch, *shape, *q.shape[2:]), sinks, slopes


@dataclass(frozen=True)
class Tile:
    scores: jax.Array  # float32 [B, K, G, q, k], -inf where hidden
    seen: jax.Array | None  # bool, broadcastable to scores; None where everything is seen
    slope: jax.Array | None  # d score / d (scaled dot product), if asked for
    distance: jax.Array | None  # float32 [B | 1, 1, 1, q, k], with ALiBi


def tile(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    slopes: jax.Array | None,
    rules: Rules,
    t: jax.Array,
    s: jax.Array,
    fresh: jax.Array | None,
    gradient: bool = False,
) -> Tile:
    """q [B, K, G, q, D] holds the queries t, k [B, K, k, D] the keys s; `fresh` [q | 1, k | 1] hides pairs too."""
    x = plan.scale * dot("bkgtd,bksd->bkgts", q, k)
    slope = None
    if plan.softcap is not None:
        tanh = jnp.tanh(x / plan.softcap)
        x = plan.softcap * tanh
        slope = 1 - tanh * tanh if gradient else None
    distance = None
    if slopes is not None:
        distance = distances(rules, t, s[None])[:, None, None].astype(jnp.float32)
        x += slopes[:, :, None, None] * distance
    seen = visible(rules, t, s)
    if seen is not None:
        rows, heads = seen.shape[:2]
        groups = k.shape[1]
        seen = seen.reshape(rows, *((1, 1) if heads == 1 else (groups, heads // groups)), *seen.shape[2:])
    if fresh is not None:
        fresh = jnp.broadcast_to(fresh, (t.shape[0], s.shape[0]))[None, None, None]
        seen = fresh if seen is None else seen & fresh
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)
    return Tile(x, seen, slope, distance)


def used_keys(seen: jax.Array | None, x: jax.Array) -> jax.Array:
    """x [B, K, k, D] with 0 for keys that no query of the tile sees: they may hold nan, and 0 * nan is nan."""
    return x if seen is None else jnp.where(seen.any((2, 3))[..., None], x, 0)


def used_queries(seen: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if seen is None else jnp.where(seen.any(4)[..., None], x, 0)


def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum with a taken in b's dtype, accumulated in float32; float32 at full precision."""
    return jnp.einsum(
        spec,
        a.astype(b.dtype),
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def starts(length: int, block: int) -> tuple[int, jax.Array]:
    """How many blocks there are and where each starts; the last one is moved back to end at the end."""
    count = -(-length // block)
    return count, jnp.minimum(jnp.arange(count) * block, length - block)


def cut(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(whole: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis)


def add_at(whole: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
    return put(whole, old + part, start, axis)


def visits(rules: Rules, blocks: XlaBlocks, by_keys: bool) -> tuple[Callable[[Any, Any], jax.Array], jax.Array]:
    """Which blocks of keys each block of queries visits, or the reverse: the n-th of block i, and how many."""
    _, q_starts = starts(rules.queries, blocks.q)
    _, k_starts = starts(rules.keys, blocks.kv)
    live = live_blocks(rules, q_starts, blocks.q, k_starts, blocks.kv)
    live = live.T if by_keys else live
    if rules.blocks is not None:
        order = jnp.argsort(~live, axis=1, stable=True)
        return lambda i, n: order[i, n], live.sum(1)
    first = jnp.argmax(live, axis=1)
    last = live.shape[1] - 1 - jnp.argmax(live[:, ::-1], axis=1)
    return lambda i, n: first[i] + n, jnp.where(live.any(1), last - first + 1, 0)


@dataclass(frozen=True)
class Chunk:
    """Some rows and key heads: where they start and how many."""

    row: Any
    rows: int
    head: Any
    heads: int

    def of(self, x: jax.Array) -> jax.Array:
        """Its part of x [B, K, ...]."""
        return cut(cut(x, self.row, self.rows, 0), self.head, self.heads, 1)

    def of_heads(self, x: jax.Array | None) -> jax.Array | None:
        """Its part of x [K, G]."""
        return None if x is None else cut(x, self.head, self.heads, 0)

    def rules(self, rules: Rules, share: int) -> Rules:
        return take(rules, self.row, self.rows, self.head * share, self.heads * share)

    def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        """whole [B, K, ...] with this part."""
        start = (self.row, self.head, *[0] * (whole.ndim - 2))
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)


def over_chunks(blocks: XlaBlocks, batch: int, groups: int, step: Callable, totals: tuple) -> tuple:
    """totals = step(chunk, totals) for every chunk of rows and key heads."""
    assert blocks.rows is not None
    assert blocks.heads is not None
    rows, heads = blocks.rows, blocks.heads
    across = groups // heads
    count = (batch // rows) * across
    if count == 1:
        return step(Chunk(0, rows, 0, heads), totals)
    return jax.lax.fori_loop(
        0, count, lambda i, totals: step(Chunk(i // across * rows, rows, i % across * heads, heads), totals), totals
    )


def for_platform(plan: Plan, run: Callable, results: Any, q: jax.Array, k: jax.Array, *arrays: Any) -> Any:
    """run(blocks, *arrays) with the blocks and dtypes of the platform that is lowered for, cast to `results`.

    A CPU computes 16-bit floats in float32 whatever the program says, and slices bfloat16 badly: it gets float32.
    """
    batch, groups, share, queries, _ = q.shape
    keys = k.shape[2]

    def on(platform: str, *arrays):
        blocks = plan.blocks or default_blocks(platform, batch, groups, share, queries, keys)
        blocks = blocks.fit(batch, groups, queries, keys)
        if platform == "cpu":
            arrays = jax.tree.map(_widened, arrays)
        return jax.tree.map(lambda x, dtype: x.astype(dtype), run(blocks, *arrays), results)

    return jax.lax.platform_dependent(*arrays, cpu=lambda *x: on("cpu", *x), default=lambda *x: on("gpu", *x))


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
