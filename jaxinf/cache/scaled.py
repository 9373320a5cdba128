"""Keys and values in eight bits, with one scale for each token and head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.cache.blocks import attend_in_blocks, cut, with_sinks
from jaxinf.cache.store import Store, before, moved, pick
from pallas_kernels import cache_append, chips, flash_decode
from pallas_kernels.cache_append import dequantize_tokens, quantize_tokens
from pallas_kernels.stored import from_bits, to_bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Store):
    """int8 or float8 with one float32 scale for each token and head, which `flash_decode` reads as they are.

    A key (rotated) or value x `[D]` of a token and head is stored as codes = round(x / scale), with scale =
    max |x| / top, where top is the format's largest value: 127 of int8, 448 of float8_e4m3fn. Rounding is to the
    nearest, ties to even. So |x - codes * scale| is at most scale / 2 in int8, and in float8_e4m3fn, which keeps
    three bits after the leading one down to 2^-6, at most max(|x| / 16, scale * 2^-10). Zeros have the scale 1.

    k, v: `[.., B, K, S, D]` in `format`; on a CPU uint8 with the bits of a float8, which it can write in place.
    k_scale, v_scale: float32 `[.., B, K, S]`.
    format: "int8" or "float8_e4m3fn".
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    format: str = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def zeros(cls, shape: tuple[int, ...], format: str) -> Scaled:
        bits = format != "int8" and chips.platform() == "cpu"
        k, v = (jnp.zeros(shape, jnp.uint8 if bits else format) for _ in range(2))
        k_scale, v_scale = (jnp.zeros(shape[:-1], jnp.float32) for _ in range(2))
        return cls(k, v, k_scale, v_scale, format)

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def _codes(self, x: jax.Array) -> jax.Array:
        return from_bits(x, jnp.dtype(self.format))

    def append(self, k, v, layer, starts, counts, *, ring=False):
        def one(stored, scales, new):
            codes, scales = cache_append(
                self._codes(stored), new, layer, starts, counts=counts, ring=ring, scales=scales
            )
            return codes if codes.dtype == stored.dtype else to_bits(codes), scales

        (k, k_scale), (v, v_scale) = one(self.k, self.k_scale, k), one(self.v, self.v_scale, v)
        return Scaled(k, v, k_scale, v_scale, self.format)

    def rounded_keys(self, k, starts, counts):
        return self.rounded_values(k)

    def rounded_values(self, v):
        return dequantize_tokens(*quantize_tokens(v, jnp.dtype(self.format)), v.dtype)

    def decode(self, q, lengths, *, layer, turn, **options):
        scales = dict(k_scale=self.k_scale, v_scale=self.v_scale)
        return flash_decode(q, self._codes(self.k), self._codes(self.v), lengths, layer=layer, **scales, **options)

    def attend(self, q, *, layer, turn, sinks=None, return_lse=False, **options):
        def one(codes, scales, start, size: int):
            codes, scales = (cut(x, layer, start, size) for x in (codes, scales))
            return dequantize_tokens(self._codes(codes), scales, q.dtype)

        def widen(start, size: int):
            return one(self.k, self.k_scale, start, size), one(self.v, self.v_scale, start, size)

        return with_sinks(attend_in_blocks(q, widen, self.slots, **options), sinks, q.dtype, return_lse)

    def latest(self, starts, count, *, layer, dtype, turn):
        at = before(starts, count) % self.slots

        def one(codes, scales):
            return dequantize_tokens(self._codes(pick(codes, layer, at)), pick(scales, layer, at), dtype)

        return one(self.k, self.k_scale), one(self.v, self.v_scale)

    def move(self, starts, path, counts, *, ring=False):
        def one(x: jax.Array, axis: int) -> jax.Array:
            return moved(x, starts, path, counts, axis=axis, ring=ring)

        axis = self.k.ndim - 2
        k, v, k_scale, v_scale = (one(x, axis) for x in (self.k, self.v, self.k_scale, self.v_scale))
        return Scaled(k, v, k_scale, v_scale, self.format)

    def map_rows(self, change):
        axis = self.k.ndim - 4
        k, v, k_scale, v_scale = (change(x, axis) for x in (self.k, self.v, self.k_scale, self.v_scale))
        return Scaled(k, v, k_scale, v_scale, self.format)
