"""`ragged_paged_attention` by its definition."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.masks import Rules
from pallas_kernels.ragged_paged_attention.pages import rows_of, split_scales, token_rows
from pallas_kernels.stored import decode


class Arrays(NamedTuple):
    """What every implementation takes. Pages and scales are stacked."""

    q: jax.Array  # [tokens, N, D]
    pages: jax.Array  # [L, P, K, page, W]
    page_scales: jax.Array | None  # [L, P, 1, 2 * K * page]
    page_table: jax.Array  # int32 [rows, pages_per_row]
    kv_lengths: jax.Array  # int32 [rows]
    q_starts: jax.Array  # int32 [rows + 1]
    layer: jax.Array  # int32
    sinks: jax.Array | None  # [N]
    alibi_slopes: jax.Array | None  # [N]
    ancestors: jax.Array | None  # bool [rows | 1, T, T]


def reference(
    arrays: Arrays,
    *,
    value_dim: int,
    latent: bool,
    scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Each row's queries over its pages (the formula of `flash_attention`), every score written out.

    Row r's queries are q[q_starts[r]:q_starts[r+1]], its n newest tokens, at positions kv_lengths[r] - n + t; its
    key at position p is pages[layer, page_table[r, p // page], k, p % page]. Returns out [tokens, N, Dv] in q's
    dtype and lse float32 [tokens, N]; 0 and -inf for tokens of no row.
    """
    q, starts = arrays.q, arrays.q_starts
    tokens = q.shape[0]
    k, v = _rows(arrays, value_dim, latent)
    counts = jnp.diff(starts)
    index = starts[:-1, None] + jnp.arange(tokens)
    queries = jnp.moveaxis(q[jnp.minimum(index, tokens - 1)], 2, 1)
    rules = Rules(
        queries=tokens,
        keys=k.shape[2],
        causal=True,
        left=left,
        right=right,
        q_offset=arrays.kv_lengths - counts,
        lengths=jnp.where(counts > 0, arrays.kv_lengths, 0),
        ancestors=_ancestors(arrays, counts),
    )
    out, lse = dense_attention(
        queries,
        k,
        v,
        rules,
        scale=scale,
        softcap=softcap,
        sinks=arrays.sinks,
        alibi_slopes=arrays.alibi_slopes,
    )
    row, used = token_rows(starts, tokens)
    at = jnp.arange(tokens) - starts[row]
    out = jnp.where(used[:, None, None], out[row, :, at], 0)
    return out.astype(q.dtype), jnp.where(used[:, None], lse[row, :, at], -jnp.inf)


def _rows(arrays: Arrays, value_dim: int, latent: bool) -> tuple[jax.Array, jax.Array]:
    """Every row's keys [rows, K, S, D] and values [rows, K, S, Dv] in float32."""
    table = rows_of(arrays.page_table, arrays.pages.shape[1])
    dim, page = arrays.q.shape[-1], arrays.pages.shape[-2]
    stored = decode(arrays.pages[arrays.layer][table])
    k = stored[..., :dim]
    v = stored[..., :value_dim] if latent else stored[..., stored.shape[-1] - value_dim :]
    if arrays.page_scales is not None:
        scales = split_scales(arrays.page_scales[arrays.layer][table], stored.shape[2], page, latent)
        k, v = (x * s[..., None] for x, s in zip((k, v), scales, strict=True))
    k, v = (jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1, x.shape[-1]) for x in (k, v))
    return k, v


def _ancestors(arrays: Arrays, counts: jax.Array) -> jax.Array | None:
    """The trees as masks over as many nodes as there are tokens; rows longer than a tree are chains."""
    if arrays.ancestors is None:
        return None
    tokens, size = arrays.q.shape[0], arrays.ancestors.shape[-1]
    chain = jnp.tril(jnp.ones((tokens, tokens), bool))
    given = jnp.broadcast_to(arrays.ancestors, (counts.shape[0], size, size))
    grow = max(tokens - size, 0)
    given = jnp.pad(given, ((0, 0), (0, grow), (0, grow)))[:, :tokens, :tokens]
    return jnp.where((counts <= size)[:, None, None], given, chain)
