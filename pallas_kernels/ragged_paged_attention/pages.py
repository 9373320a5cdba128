"""What a page holds, and the checks that reading and writing pages share.

A page holds `page` tokens of every key head: pages [P, K, page, W], or [L, P, K, page, W] for stacked layers. A
token's row of W numbers is its key first and its value last, D + Dv <= W; with one latent for both (multi-head
latent attention) the row is the key, and the value is the key's first Dv numbers. So a page is one contiguous copy,
a head's rows are an operand of the matrix unit as they lie, and head sizes of 64 fill the 128 lanes of a TPU's
memory. A quantised cache has a float32 scale for each key and value: page_scales [P, 1, 2 * K * page] (key scales
then value scales, each by head then slot; latents have one half), so that a page's scales are one copy as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import InputError
from pallas_kernels.stored import STORED
from pallas_kernels.validate import check_dtype, check_range, check_shape, integers, known

LANES = 128


def page_width(head_dim: int, value_dim: int | None = None, *, latent: bool = False) -> int:
    """W for a TPU: the row of a key and a value, up to whole lanes of 128 (other platforms need no rounding)."""
    width = head_dim if latent else head_dim + (head_dim if value_dim is None else value_dim)
    return -(-width // LANES) * LANES


def empty_pages(
    count: int,
    kv_heads: int,
    page_size: int,
    width: int,
    dtype,
    *,
    layers: int | None = None,
    latent: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Zeroed pages, and their scales where `dtype` is int8 or float8 (else None)."""
    lead = () if layers is None else (layers,)
    pages = jnp.zeros((*lead, count, kv_heads, page_size, width), dtype)
    if not needs_scales(pages.dtype):
        return pages, None
    return pages, jnp.ones((*lead, count, 1, scale_count(kv_heads, page_size, latent)), jnp.float32)


def needs_scales(dtype) -> bool:
    return jnp.dtype(dtype).itemsize == 1


def scale_count(kv_heads: int, page_size: int, latent: bool) -> int:
    return (1 if latent else 2) * kv_heads * page_size


def check_pages(
    pages: jax.Array, page_scales: jax.Array | None, layer: Any, dim: int, value_dim: int | None, latent: bool
) -> tuple[bool, jax.Array, int]:
    """Whether the pages are stacked, the layer as an int32 scalar, and Dv.

    Raises:
      InputError: what does not fit, the argument named.
    """
    check_dtype("pages", pages, STORED)
    if pages.ndim not in (4, 5):
        raise InputError(
            f"pages.shape={pages.shape}, but pages are [P, K, page, W], or [L, P, K, page, W] with layer=."
        )
    stacked = pages.ndim == 5
    if stacked != (layer is not None):
        need = f"needs layer=0..{pages.shape[0] - 1}" if stacked else "takes no layer: pass layer=None"
        raise InputError(f"pages.shape={pages.shape} and layer={layer}, but an array of {pages.ndim} axes {need}.")
    index = integers("layer", 0 if layer is None else layer, (), "")
    if stacked:
        check_range("layer", index, 0, pages.shape[0] - 1, f"pages stacks {pages.shape[0]} layers")
    heads, size, width = pages.shape[-3:]
    if 0 in (heads, size, pages.shape[-4]):
        raise InputError(f"pages.shape={pages.shape}, but there must be a page, a head and a slot at least.")
    values = dim if value_dim is None else value_dim
    if latent and not 1 <= values <= dim:
        raise InputError(f"value_dim={values} and D={dim}, but a latent's value is 1..{dim} of the key's numbers.")
    if values < 1 or width < (dim if latent else dim + values):
        need = f"{dim}, the key" if latent else f"{dim + values}, a key of {dim} and a value of {values}"
        raise InputError(f"pages.shape={pages.shape}, but its last axis must hold {need}: see page_width.")
    if pages.dtype == jnp.int8 and page_scales is None:
        raise InputError("The pages are int8 and have no scales, but page_scales [P, 1, 2 * K * page] are needed.")
    if page_scales is not None:
        check_dtype("page_scales", page_scales, (jnp.float32,))
        letters = ("L, " if stacked else "") + "P, 1, " + ("" if latent else "2 * ") + "K * page"
        check_shape("page_scales", page_scales, (*pages.shape[:-3], 1, scale_count(heads, size, latent)), letters)
    return stacked, index, values


def check_rows(
    page_table: Any, kv_lengths: Any, q_starts: Any, tokens: int, page_size: int, count: int, left: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays that say which tokens and pages a row has, as int32, refused where known values do not fit."""
    page_table = integers("page_table", page_table, (None, None), "rows, pages_per_row")
    rows, per_row = page_table.shape
    kv_lengths = integers("kv_lengths", kv_lengths, (rows,), "rows")
    q_starts = integers("q_starts", q_starts, (rows + 1,), "rows + 1")
    check_range("q_starts", q_starts, 0, tokens, f"q has {tokens} tokens")
    starts, lengths, table = known(q_starts), known(kv_lengths), known(page_table)
    if starts is not None and (np.diff(starts) < 0).any():
        raise InputError(
            f"q_starts={starts.tolist()}, but it must not fall: row r has the tokens q_starts[r]..q_starts[r+1]-1."
        )
    if starts is None or lengths is None:
        return page_table, kv_lengths, q_starts
    used = np.diff(starts) > 0
    lengths = np.where(used, lengths, 0)
    if lengths.size and (lengths.min() < 0 or lengths.max() > per_row * page_size):
        raise InputError(
            f"kv_lengths={lengths.tolist()}, but 0..{per_row * page_size} is allowed: page_table has {per_row} "
            f"pages of {page_size} a row."
        )
    if table is not None and table.size:
        first = 0 * lengths if left is None else np.maximum(lengths - np.diff(starts) - left, 0) // page_size
        index = np.arange(per_row)
        live = (index >= first[:, None]) & (index < -(-lengths // page_size)[:, None])
        wrong = live & ((table < 0) | (table >= count))
        if wrong.any():
            row, at = np.argwhere(wrong)[0]
            raise InputError(
                f"page_table[{row}, {at}]={table[row, at]}, but 0..{count - 1} is allowed: there are {count} pages."
            )
    return page_table, kv_lengths, q_starts


def rows_of(page_table: jax.Array, count: int) -> jax.Array:
    """Page ids that may be read whatever they are: those out of range become the nearest page."""
    return jnp.clip(page_table, 0, count - 1)


def split_scales(scales: jax.Array, kv_heads: int, page_size: int, latent: bool) -> tuple[jax.Array, jax.Array]:
    """Key and value scales [..., K, page] of scales [..., 1, 2 * K * page]."""
    parts = scales.reshape(*scales.shape[:-2], 1 if latent else 2, kv_heads, page_size)
    return parts[..., 0, :, :], parts[..., -1, :, :]


def token_rows(q_starts: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """The row of each token (the last one for tokens of no row), and whether it has one."""
    rows = q_starts.shape[0] - 1
    index = jnp.arange(tokens)
    row = jnp.searchsorted(q_starts, index, side="right").astype(jnp.int32) - 1
    return jnp.clip(row, 0, rows - 1), (index >= q_starts[0]) & (index < q_starts[rows])
