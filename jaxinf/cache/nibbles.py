"""Four bits a number: codes of 0..15 between a least value and 15 steps above it, packed in pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TOP = 15
_LOW = jnp.uint32(0xFFFF)


def encode(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes and ranges of numbers that share a range along `axis`.

    zero is the least of them rounded down, step a fifteenth of what the largest is above it, rounded up, both to
    bfloat16; x is about zero + step * round((x - zero) / step), and never further from it than step / 2. The step
    is 2^-100 at least, so that equal numbers have codes too.

    Returns:
      (codes int32 of 0..15, x's shape; ranges float32, that shape without `axis`, step and zero in one: `parts`).
    """
    x = x.astype(jnp.float32)
    zero = _rounded_down(x.min(axis, keepdims=True))
    step = -_rounded_down(-jnp.maximum((x.max(axis, keepdims=True) - zero) * (1 / TOP), 2.0**-100))
    codes = jnp.clip(jnp.rint((x - zero) / step), 0, TOP).astype(jnp.int32)
    bits = _bits(step) | (_bits(zero) >> 16)
    return codes, jax.lax.bitcast_convert_type(bits, jnp.float32).squeeze(axis)


def parts(ranges: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step and zero, float32.

    A range is two bfloat16 in the bits of a float32. The step comes first: it is positive and normal, so what moves
    float32 about sees a normal number and keeps all of its bits.
    """
    bits = _bits(ranges)
    step, zero = bits & ~_LOW, bits << 16
    return jax.lax.bitcast_convert_type(step, jnp.float32), jax.lax.bitcast_convert_type(zero, jnp.float32)


def decode(codes: jax.Array, ranges: jax.Array) -> jax.Array:
    """Numbers, float32; ranges as `encode` gave them, with the missing axis."""
    step, zero = parts(ranges)
    return zero + step * codes.astype(jnp.float32)


def pack(codes: jax.Array) -> jax.Array:
    """`[..., D]` of 0..15 as int8 `[..., D / 2]`: the first half of the numbers in the lower bits."""
    low, high = jnp.split(codes, 2, axis=-1)
    return jax.lax.bitcast_convert_type((low | high << 4).astype(jnp.uint8), jnp.int8)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack`, int32."""
    wide = packed.astype(jnp.int32)
    return jnp.concatenate([wide & TOP, wide >> 4 & TOP], axis=-1)


def _rounded_down(x: jax.Array) -> jax.Array:
    """The next bfloat16 at or below x, in float32."""
    bits = _bits(x)
    up = (bits & _LOW != 0) & (x < 0)
    return jax.lax.bitcast_convert_type((bits & ~_LOW) + jnp.where(up, jnp.uint32(0x10000), 0), jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
