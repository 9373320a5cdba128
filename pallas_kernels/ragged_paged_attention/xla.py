"""`ragged_paged_attention` for CPUs and GPUs: tiles of queries, a few pages of each at a time.

Rows fall in classes, each with its own tile: rows of one token (decoding) many at a time, drafted trees whole,
and longer chunks a tile at a time. A tile reads only the pages that its queries may see, so time follows the live
tokens and memory the tokens of the pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.masks import Rules, distances, visible
from pallas_kernels.ragged_paged_attention.blocks import Blocks
from pallas_kernels.ragged_paged_attention.pages import rows_of, split_scales
from pallas_kernels.ragged_paged_attention.reference import Arrays
from pallas_kernels.stored import decode, from_bits, to_bits

KEYS = 256  # of a tile's row at a time
CHUNK = 64  # queries of a chunk's tile
TOGETHER = 16  # rows of one token at a time


class Options(NamedTuple):
    value_dim: int
    latent: bool
    scale: float
    softcap: float | None
    left: int | None
    right: int | None


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames=("value_dim", "latent", "scale", "softcap", "left", "right", "blocks"))
def xla(
    arrays: Arrays,
    *,
    value_dim: int,
    latent: bool,
    scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same maths, arguments and results as the reference."""
    options = Options(value_dim, latent, scale, softcap, left, right)
    tokens, heads, _ = arrays.q.shape
    rows = arrays.page_table.shape[0]
    counts = jnp.diff(arrays.q_starts)
    per_step = blocks.pages if blocks is not None else -(-KEYS // arrays.pages.shape[-2])
    per_step = min(per_step, arrays.page_table.shape[1])
    state = (jnp.zeros((tokens, heads, value_dim)), jnp.full((tokens, heads), -jnp.inf))

    chunk = min(CHUNK if blocks is None else blocks.q_tile, tokens)
    trees = 0 if arrays.ancestors is None else arrays.ancestors.shape[-1]
    if trees:
        of_tree = (counts > 0) & (counts <= trees)
        together = max(1, min(rows, TOGETHER // trees))
        state = _run(arrays, options, state, of_tree, trees, together, per_step, tree=True)
    else:
        state = _run(arrays, options, state, counts == 1, 1, min(rows, TOGETHER), per_step)
    if tokens > max(trees, 1):
        state = _run(arrays, options, state, counts > max(trees, 1), chunk, 1, per_step)
    return state[0].astype(arrays.q.dtype), state[1]


def _run(
    arrays: Arrays,
    options: Options,
    state: tuple[jax.Array, jax.Array],
    chosen: jax.Array,
    size: int,
    together: int,
    per_step: int,
    *,
    tree: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes the results of the chosen rows, cut into tiles of `size` queries, `together` tiles at a time."""
    counts = jnp.diff(arrays.q_starts)
    ends = jnp.cumsum(jnp.where(chosen, -(-counts // size), 0))
    tokens = arrays.q.shape[0]

    def body(group, state):
        item = group * together + jnp.arange(together)
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), ends.shape[0] - 1)
        nth = item - jnp.where(row > 0, ends[row - 1], 0)
        first = jnp.where(item < ends[-1], nth * size, tokens)
        index = first[:, None] + jnp.arange(size)
        at = jnp.where(index < counts[row][:, None], arrays.q_starts[row][:, None] + index, tokens)
        out, lse = _tile(arrays, options, row, first, at, per_step, tree)
        return state[0].at[at].set(out, mode="drop"), state[1].at[at].set(lse, mode="drop")

    groups = -(-ends[-1] // together)
    return jax.lax.fori_loop(0, groups, body, state)


def _tile(
    arrays: Arrays,
    options: Options,
    row: jax.Array,
    first: jax.Array,
    at: jax.Array,
    per_step: int,
    tree: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the queries `at` [B, t] (tokens: none) of rows `row` [B], from the row's `first`th on."""
    q, pages, layer = arrays.q, arrays.pages, arrays.layer
    _, heads, dim = q.shape
    _, count, groups, page, width = pages.shape
    batch, size = at.shape
    share = heads // groups
    table = rows_of(arrays.page_table, count)
    length = arrays.kv_lengths[row]
    live = jnp.clip(length, 0, table.shape[1] * page)
    offset = length - jnp.diff(arrays.q_starts)[row] + first
    ancestors = arrays.ancestors
    if tree:
        assert ancestors is not None
        ancestors = ancestors if ancestors.shape[0] == 1 else ancestors[row]
    rules = Rules(
        queries=size,
        keys=table.shape[1] * page,
        causal=True,
        left=options.left,
        right=options.right,
        q_offset=offset,
        lengths=live,
        ancestors=ancestors if tree else None,
    )
    t = jnp.arange(size)
    asked = at < q.shape[0]
    queries = jnp.where(asked[..., None, None], q[jnp.minimum(at, q.shape[0] - 1)].astype(jnp.float32), 0)
    queries = jnp.moveaxis(queries * options.scale, 1, 2).reshape(batch, groups, share * size, dim)
    bits = to_bits(pages)
    scales = arrays.page_scales

    def step(j, state):
        """A few more pages: running maximum, sum and weighted values."""
        peak, total, acc = state
        slot = j * per_step + jnp.arange(per_step)
        ids = table[row[:, None], jnp.minimum(slot, table.shape[1] - 1)]
        block = from_bits(bits[layer, ids], pages.dtype)
        k = decode(block[..., :dim])
        v = decode(block[..., : options.value_dim] if options.latent else block[..., width - options.value_dim :])
        s = j * per_step * page + jnp.arange(per_step * page)
        seen = visible(rules, t, s)
        assert seen is not None
        seen = seen[:, 0] & asked[..., None]  # [B, t, s]
        used = seen.any(1)[:, None]
        v = jnp.where(_by_page(used, per_step), v, 0)  # Hidden slots may hold nan, and 0 * nan is nan.
        x = jnp.einsum("bkrd,bpksd->bkrps", queries, k, precision=jax.lax.Precision.HIGHEST)
        x = x.reshape(batch, groups, share * size, -1)
        if scales is not None:
            k_scale, v_scale = split_scales(scales[layer, ids], groups, page, options.latent)
            k_scale, v_scale = (_by_head(part)[:, :, None] for part in (k_scale, v_scale))
            x *= k_scale
        if options.softcap is not None:
            x = options.softcap * jnp.tanh(x / options.softcap)
        x = x.reshape(batch, groups, share, size, -1)
        if arrays.alibi_slopes is not None:
            far = distances(rules, t, s[None]).astype(jnp.float32)
            x += arrays.alibi_slopes.reshape(groups, share, 1, 1) * far[:, None, None]
        x = jnp.where(seen[:, None, None], x, -jnp.inf)
        new_peak = jnp.maximum(peak, x.max(-1))
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights = jnp.exp(x - base[..., None])
        fade = jnp.exp(peak - base)
        total = total * fade + weights.sum(-1)
        weights = weights.reshape(batch, groups, share * size, -1)
        if scales is not None:
            weights *= jnp.where(used[:, :, None], v_scale, 0)
        weights = weights.reshape(batch, groups, share * size, per_step, page)
        part = jnp.einsum("bkrps,bpksd->bkrd", weights, v, precision=jax.lax.Precision.HIGHEST)
        acc = acc * fade.reshape(batch, groups, share * size, 1) + part
        return new_peak, total, acc

    shape = (batch, groups, share, size)
    if arrays.sinks is None:
        peak, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    else:
        peak, total = jnp.broadcast_to(arrays.sinks.reshape(groups, share, 1), shape), jnp.ones(shape)
    state = (peak, total, jnp.zeros((batch, groups, share * size, options.value_dim)))
    last = jnp.where(asked.any(1), jnp.minimum(live, offset + size if not tree else live), 0)
    begin = 0
    if options.left is not None:
        oldest = jnp.where(asked.any(1), jnp.maximum(offset - options.left, 0), rules.keys)
        begin = jnp.minimum(oldest.min(), rules.keys) // (per_step * page)
    state = jax.lax.fori_loop(begin, -(-last.max() // (per_step * page)), step, state)
    peak, total, acc = state
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = acc.reshape(*shape, -1) / total[..., None]
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
    out = jnp.moveaxis(out.reshape(batch, heads, size, -1), 1, 2)
    return out, jnp.moveaxis(lse.reshape(batch, heads, size), 1, 2)


def _by_page(used: jax.Array, pages: int) -> jax.Array:
    """[B, 1, s] as [B, p, 1, s, 1]."""
    return used.reshape(used.shape[0], pages, 1, -1, 1)


def _by_head(scales: jax.Array) -> jax.Array:
    """[B, p, K, s] as [B, K, p * s]."""
    return jnp.moveaxis(scales, 1, 2).reshape(scales.shape[0], scales.shape[2], -1)
