"""Writing new tokens to pages, in place."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.errors import InputError
from pallas_kernels.paged_append.kernel import pallas, unsupported
from pallas_kernels.paged_append.reference import New, reference, xla
from pallas_kernels.ragged_paged_attention.pages import check_pages, check_rows
from pallas_kernels.stored import encode
from pallas_kernels.validate import FLOATS, check_dtype, check_shape


def paged_append(
    pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_starts: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    page_scales: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Pages with the new tokens of each row in their slots; in place where the pages are donated or carried.

    Token t of row r's n new ones has the position p = kv_lengths[r] - n + t, which is slot p % page of the page
    page_table[r, p // page].
    int8 and float8 pages are quantised on the way, symmetrically, with a scale for each token and key head: the
    largest magnitude becomes the largest number of the dtype.

    Args:
      pages: [P, K, page, W] or [L, P, K, page, W]; see `ragged_paged_attention`.
      k: [tokens, K, D], float32, bfloat16 or float16.
      v: [tokens, K, Dv], or None for latents, where k [tokens, 1, D] is all there is.
      page_table, kv_lengths, q_starts: as for `ragged_paged_attention`; kv_lengths count the new tokens. Tokens
        before the text or beyond the table are dropped. Under `jit`, so are tokens of pages out of range. No page
        that is written to may be in two places of the table.
      layer: which layer of stacked pages is written; may be traced (out of range then means the nearest layer).
      page_scales: float32 [P, 1, 2 * K * page] (latents: K * page), or with L before. int8 pages need them; float8
        pages without them are cast.
      implementation: "reference", "xla", "pallas" or "interpret"; None chooses by platform.

    Returns:
      (pages, page_scales), of the same shapes and dtypes; all other slots as they were. A row's numbers between
      key and value become 0.

    Raises:
      InputError: shapes, dtypes or values that do not fit, the argument named.
    """
    check_implementation(implementation)
    check_dtype("k", k, FLOATS)
    check_shape("k", k, (None, pages.shape[-3] if pages.ndim > 2 else None, None), "tokens, K, D")
    tokens, heads, dim = k.shape
    latent = v is None
    if v is not None:
        check_shape("v", v, (tokens, heads, None), "tokens, K, Dv")
        if v.dtype != k.dtype:
            raise InputError(f"k and v have dtypes {k.dtype.name} and {v.dtype.name}, but they must be equal.")
    values = dim if v is None else v.shape[-1]
    stacked, layer, _ = check_pages(pages, page_scales, layer, dim, values, latent)
    size = pages.shape[-2]
    count = pages.shape[-4]
    page_table, kv_lengths, q_starts = check_rows(page_table, kv_lengths, q_starts, tokens, size, count, 0)
    if 0 in (*k.shape, *page_table.shape):
        return pages, page_scales
    if not stacked:
        pages, page_scales = pages[None], None if page_scales is None else page_scales[None]
    new, scales = rows_to_store(k, v, pages.shape[-1], pages.dtype, page_scales is not None)
    arrays = New(pages, page_scales, new, scales, page_table, kv_lengths, q_starts, layer)
    out, out_scales = dispatch(
        "paged_append",
        implementation,
        arrays,
        reference=reference,
        xla=xla,
        pallas=pallas,
        unsupported=unsupported(pages, page_table),
    )
    return (out, out_scales) if stacked else (out[0], None if out_scales is None else out_scales[0])


def rows_to_store(
    k: jax.Array, v: jax.Array | None, width: int, dtype: Any, scaled: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Rows [tokens, K, W] in the pages' dtype, and their scales float32 [tokens, 1 or 2, K]."""
    parts, scales = [], []
    for x in (k,) if v is None else (k, v):
        if scaled:
            x = x.astype(jnp.float32)
            top = jnp.max(jnp.abs(x), axis=-1)
            integer = jnp.issubdtype(dtype, jnp.integer)
            limit = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
            scale = jnp.where(top > 0, top / limit, 1.0)
            x = x / scale[..., None]
            x = jnp.clip(jnp.rint(x), -limit, limit) if integer else jnp.clip(x, -limit, limit)
            scales.append(scale)
        parts.append(encode(x, dtype))
    spare = width - sum(part.shape[-1] for part in parts)
    if spare:
        parts.insert(1, jnp.zeros((*k.shape[:-1], spare), parts[0].dtype))
    return jnp.concatenate(parts, axis=-1), jnp.stack(scales, axis=1) if scales else None
