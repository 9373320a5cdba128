"""Writing new tokens into a cache, in place."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.cache_append.reference import reference
from pallas_kernels.cache_append.xla import xla
from pallas_kernels.errors import InputError
from pallas_kernels.stored import STORED
from pallas_kernels.validate import (
    check_dtype,
    check_implementation,
    check_range,
    check_shape,
    integers,
    stacked_layer,
)


def cache_append(
    cache: jax.Array,
    new: jax.Array,
    layer: int | jax.Array | None,
    starts: jax.Array,
    *,
    counts: jax.Array | None = None,
    ring: bool = False,
    implementation: Literal["reference", "xla"] | None = None,
) -> jax.Array:
    """The cache with new[b, :, t] in slot starts[b] + t of row b; in place where the cache is donated or carried.

    Args:
      cache: [L, B, K, S, D], or [B, K, S, D] with layer=None: float32, bfloat16, float16, int8, float8, or uint16
        for the bits of bfloat16. A CPU updates bfloat16 and float8 by copying the cache, the others in place.
      new: [B, K, T, D], cast to the cache's dtype (values for an int8 cache must be quantised already).
      layer: which layer of a stacked cache, 0..L-1; may be traced (out of range then means the nearest layer).
      starts: int32 [B], the slot, or in a ring the position, of each row's first new token.
      counts: int32 [B], how many tokens of each row are written, 0..T; default T.
      ring: slots are taken modulo S; of tokens that share a slot the last one stays. Without it, tokens whose
        slot is outside 0..S-1 are dropped.
      implementation: "reference" or "xla"; None chooses.

    Returns:
      The cache, of the same shape and dtype; all other slots as they were.

    Raises:
      InputError: shapes, dtypes or values that do not fit, the argument named.
    """
    check_dtype("cache", cache, STORED)
    stacked, layer = stacked_layer("cache", cache, layer)
    batch, groups, _, dim = cache.shape[-4:]
    check_shape("new", new, (batch, groups, None, dim), "B, K, T, D")
    if cache.dtype == jnp.int8 and new.dtype != jnp.int8:
        raise InputError(f"new.dtype={new.dtype.name} for an int8 cache, but it must be int8: quantise it first.")
    tokens = new.shape[2]
    starts = integers("starts", starts, (batch,), "B")
    check_range("starts", starts, 0, None, "each is the slot of its row's first new token")
    if counts is None:
        counts = jnp.full_like(starts, tokens)
    else:
        counts = integers("counts", counts, (batch,), "B")
        check_range("counts", counts, 0, tokens, "each counts the tokens of its row that are written")
    if 0 in (*new.shape, *cache.shape):
        return cache
    write = reference if check_implementation(implementation) == "reference" else xla
    out = write(cache if stacked else cache[None], new, layer, starts, counts, ring=ring)
    return out if stacked else out[0]
