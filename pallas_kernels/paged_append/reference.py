"""`paged_append` in plain `jax.numpy`, and the same for CPUs and GPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.pages import token_rows
from pallas_kernels.stored import from_bits, to_bits


class New(NamedTuple):
    """What every implementation takes. Pages and scales are stacked."""

    pages: jax.Array  # [L, P, K, page, W]
    page_scales: jax.Array | None  # [L, P, 1, 2 * K * page]
    rows: jax.Array  # [tokens, K, W] in the pages' dtype
    scales: jax.Array | None  # float32 [tokens, 2, K]; latents: [tokens, 1, 1]
    page_table: jax.Array  # int32 [rows, pages_per_row]
    kv_lengths: jax.Array  # int32 [rows]
    q_starts: jax.Array  # int32 [rows + 1]
    layer: jax.Array  # int32


def reference(arrays: New) -> tuple[jax.Array, jax.Array | None]:
    """pages[layer, page_table[r, p // page], :, p % page] = rows[g] for the token g of row r at position p, and the
    scales likewise."""
    pages, scales = arrays.pages, arrays.page_scales
    layer = jnp.clip(arrays.layer, 0, pages.shape[0] - 1)
    page, slot = places(arrays)
    pages = pages.at[layer, page, :, slot].set(arrays.rows, mode="drop")
    if scales is not None:
        assert arrays.scales is not None
        size, heads = pages.shape[-2], pages.shape[-3]
        sides = arrays.scales.shape[1]
        lane = (jnp.arange(sides)[:, None] * heads + jnp.arange(heads)) * size + slot[:, None, None]
        scales = scales.at[layer, page[:, None, None], 0, lane].set(arrays.scales, mode="drop")
    return pages, scales


def xla(arrays: New) -> tuple[jax.Array, jax.Array | None]:
    """The reference on the numbers' bits, which a CPU scatters in place."""
    dtype = arrays.pages.dtype
    pages, scales = reference(arrays._replace(pages=to_bits(arrays.pages), rows=to_bits(arrays.rows)))
    return from_bits(pages, dtype), scales


def places(arrays: New) -> tuple[jax.Array, jax.Array]:
    """Page and slot of each new token, int32 [tokens]; a page that is out of range where it is dropped."""
    _, count, _, size, _ = arrays.pages.shape
    tokens = arrays.rows.shape[0]
    row, used = token_rows(arrays.q_starts, tokens)
    position = arrays.kv_lengths[row] - arrays.q_starts[row + 1] + jnp.arange(tokens)
    per_row = arrays.page_table.shape[1]
    page = arrays.page_table[row, jnp.clip(position // size, 0, per_row - 1)]
    fine = used & (position >= 0) & (position < per_row * size) & (page >= 0)
    return jnp.where(fine, page, count), position % size
