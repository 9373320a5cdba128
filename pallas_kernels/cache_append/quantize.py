"""Quantisation of the tokens that go into a cache with scales, and back."""

import jax
import jax.numpy as jnp


def quantize_tokens(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """x [..., D] as values of `dtype` and one scale for each vector, so that values * scale is about x.

    The scale maps the vector's largest magnitude to the dtype's largest value; int8 uses -127..127. A zero vector
    has the scale 1.

    Returns:
      (values [..., D] of `dtype`, scales float32 [...]).
    """
    x = x.astype(jnp.float32)
    integer = jnp.issubdtype(dtype, jnp.integer)
    top = 127.0 if integer else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest > 0, largest * (1 / top), 1.0)
    x = jnp.clip(x / scale[..., None], -top, top)
    return (jnp.rint(x) if integer else x).astype(dtype), scale


def dequantize_tokens(values: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """What `quantize_tokens` made, or a part of it, as floats: values [..., D], scales float32 [...]."""
    return (values.astype(jnp.float32) * scales[..., None]).astype(dtype)
