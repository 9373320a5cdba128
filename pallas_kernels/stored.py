"""How caches are stored: which dtypes, and reading and writing slices of them without touching the rest.

XLA on the CPU has no bfloat16 or float8 slices: to update one token it turns the whole cache into float32 and back.
As unsigned integers slices stay slices. So the ops also take a cache of uint16 that holds the bits of bfloat16,
the form to choose on a CPU; there it is the only 16-bit one that a loop updates in place besides float16. On a TPU
or GPU choose bfloat16.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.validate import FLOATS, QUANTIZED

BFLOAT16_BITS = jnp.uint16
STORED = (*FLOATS, *QUANTIZED, BFLOAT16_BITS)

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16}


def storage_dtype(dtype, platform: str) -> jnp.dtype:
    """The dtype in which a cache of `dtype` is best kept on a platform ("cpu", "gpu", "tpu")."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(BFLOAT16_BITS) if platform == "cpu" and dtype == jnp.bfloat16 else dtype


def to_bits(x: jax.Array) -> jax.Array:
    """bfloat16 or float8 as an unsigned integer of the same bits; anything else as it is."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize in _UNSIGNED and x.dtype != jnp.float16
    return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]) if narrow else x


def from_bits(x: jax.Array, dtype) -> jax.Array:
    """What `to_bits` made of an array of `dtype`, back in it."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def encode(x: jax.Array, dtype) -> jax.Array:
    """Values as a cache of `dtype` stores them."""
    return to_bits(x.astype(jnp.bfloat16)) if dtype == BFLOAT16_BITS else x.astype(dtype)


def decode(x: jax.Array) -> jax.Array:
    """Stored values in float32."""
    if x.dtype == jnp.bfloat16:
        x = to_bits(x)
    if x.dtype == BFLOAT16_BITS:
        return jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(jnp.float32)


def read_slice(x: jax.Array, starts: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    """`jax.lax.dynamic_slice` in float32."""
    return decode(from_bits(jax.lax.dynamic_slice(to_bits(x), starts, sizes), x.dtype))
