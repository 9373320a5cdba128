"""Writing new tokens into a cache, in place."""

from functools import partial
from typing import overload

import jax
import jax.numpy as jnp

from pallas_kernels.cache_append.blocks import Blocks, misfits
from pallas_kernels.cache_append.kernel import pallas
from pallas_kernels.cache_append.quantize import quantize_tokens
from pallas_kernels.cache_append.reference import reference
from pallas_kernels.cache_append.xla import xla
from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.errors import InputError
from pallas_kernels.stored import STORED
from pallas_kernels.validate import (
    FLOATS,
    QUANTIZED,
    check_dtype,
    check_range,
    check_shape,
    integers,
    stacked_layer,
)


@overload
def cache_append(
    cache: jax.Array,
    new: jax.Array,
    layer: int | jax.Array | None,
    starts: jax.Array,
    *,
    counts: jax.Array | None = None,
    ring: bool = False,
    scales: None = None,
    new_scales: None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def cache_append(
    cache: jax.Array,
    new: jax.Array,
    layer: int | jax.Array | None,
    starts: jax.Array,
    *,
    counts: jax.Array | None = None,
    ring: bool = False,
    scales: jax.Array,
    new_scales: jax.Array | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def cache_append(
    cache: jax.Array,
    new: jax.Array,
    layer: int | jax.Array | None,
    starts: jax.Array,
    *,
    counts: jax.Array | None = None,
    ring: bool = False,
    scales: jax.Array | None = None,
    new_scales: jax.Array | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
):
    """The cache with new[b, :, t] in slot starts[b] + t of row b; in place where the cache is donated or carried.

    Args:
      cache: [L, B, K, S, D], or [B, K, S, D] with layer=None: float32, bfloat16, float16, int8, float8, or uint16
        for the bits of bfloat16. A CPU updates bfloat16 and float8 by copying the cache, the others in place. On a
        TPU let S be a multiple of 128, or XLA may lay out a cache that enters a program in another way than the
        kernels need, and copy it.
      new: [B, K, T, D], cast to the cache's dtype (values for an int8 cache without `scales` must be int8 already).
      layer: which layer of a stacked cache, 0..L-1; may be traced (out of range then means the nearest layer).
      starts: int32 [B], the slot, or in a ring the position, of each row's first new token.
      counts: int32 [B], how many tokens of each row are written, 0..T; default T.
      ring: slots are taken modulo S; of tokens that share a slot the last one stays. Without it, tokens whose
        slot is outside 0..S-1 are dropped.
      scales: float32 [L, B, K, S] or [B, K, S], of an int8 or float8 cache: each token's vector of each head is
        quantised, so that its largest magnitude becomes the dtype's largest value, and its scale is stored too.
      new_scales: float32 [B, K, T], with `scales`: `new` is quantised already, in the cache's dtype, and these are
        stored beside it.
      blocks: sizes for the kernel; it chooses by itself.
      implementation: "reference", "xla", "pallas" or "interpret" (the kernel in the TPU interpreter); None takes
        the kernel on TPUs and "xla" elsewhere.

    Returns:
      The cache, of the same shape and dtype, or with `scales` (cache, scales); all other slots as they were.

    Raises:
      InputError: shapes, dtypes or values that do not fit, the argument named.
      UnsupportedError: "pallas" or "interpret" was asked for and the kernel cannot serve the call.
    """
    check_dtype("cache", cache, STORED)
    stacked, layer = stacked_layer("cache", cache, layer)
    batch, groups, _, dim = cache.shape[-4:]
    check_shape("new", new, (batch, groups, None, dim), "B, K, T, D")
    if scales is None and new_scales is not None:
        raise InputError("new_scales was given without scales, the array that they go to: pass both.")
    if scales is not None:
        check_dtype("scales", scales, (jnp.float32,))
        check_shape("scales", scales, cache.shape[:-1], "L, B, K, S" if stacked else "B, K, S")
        if not any(cache.dtype == dtype for dtype in QUANTIZED):
            raise InputError(f"cache.dtype={cache.dtype.name} with scales, but only int8 and float8 take them.")
        if new_scales is None:
            check_dtype("new", new, FLOATS)
            new, new_scales = quantize_tokens(new, cache.dtype)
        else:
            check_dtype("new", new, (cache.dtype,))
            check_dtype("new_scales", new_scales, (jnp.float32,))
            check_shape("new_scales", new_scales, new.shape[:-1], "B, K, T")
    elif cache.dtype == jnp.int8 and new.dtype != jnp.int8:
        raise InputError(
            f"new.dtype={new.dtype.name} for an int8 cache, but it must be int8: quantise it, or pass scales."
        )
    tokens = new.shape[2]
    starts = integers("starts", starts, (batch,), "B")
    check_range("starts", starts, 0, None, "each is the slot of its row's first new token")
    if counts is None:
        counts = jnp.full_like(starts, tokens)
    else:
        counts = integers("counts", counts, (batch,), "B")
        check_range("counts", counts, 0, tokens, "each counts the tokens of its row that are written")
    check_implementation(implementation)
    if 0 in (*new.shape, *cache.shape):
        return cache if scales is None else (cache, scales)
    if not stacked:
        cache, scales = cache[None], None if scales is None else scales[None]
    written = dispatch(
        "cache_append",
        implementation,
        *(cache, new, layer, starts, counts, scales, new_scales),
        reference=partial(reference, ring=ring),
        xla=partial(xla, ring=ring),
        pallas=partial(pallas, ring=ring, blocks=blocks),
        unsupported=_unsupported(cache, blocks),
    )
    written = tuple(x if stacked else x[0] for x in written)
    return written[0] if scales is None else written


def _unsupported(cache: jax.Array, blocks: Blocks | None) -> list[str]:
    """Why the kernel cannot serve a call."""
    reasons = []
    if cache.dtype == jnp.float16:
        reasons.append("a float16 cache has no vector loads on TPUs: store bfloat16 or float32")
    return reasons + ([] if blocks is None else misfits(cache.shape[1], blocks))
