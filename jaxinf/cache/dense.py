"""The cache that keeps every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache.base import DECODE_TOKENS, AttentionRule, LayerCache, Step, attend_alone
from pallas_kernels import cache_append, flash_attention, flash_decode
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.stored import BFLOAT16_BITS, from_bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache(LayerCache):
    """Token p of a row lives in slot p. `k, v [B, K, S, D]`, or `[L, B, K, S, D]` stacked; keys rotated."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, layers: int | None, batch: int, kv_heads: int, slots: int, head_dim: int, dtype) -> DenseCache:
        lead = () if layers is None else (layers,)
        # Two arrays, not one twice: donated buffers must differ.
        return cls(*(jnp.zeros((*lead, batch, kv_heads, slots, head_dim), dtype) for _ in range(2)))

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        if step.zigzag:
            raise UnsupportedError(
                "DenseCache holds whole rows, but the pass is split over sequence: make the cache under its mesh."
            )
        q, k = rule.turn(q, step.positions), rule.turn(k, step.positions)
        cache = self.append(k, v, step, layer)
        tokens = q.shape[2]
        if step.fresh and tokens > 1:
            out = attend_alone(q, k, v, step, rule)
        elif tokens <= DECODE_TOKENS:
            out = flash_decode(q, cache.k, cache.v, step.starts + tokens, layer=layer, **rule.mask)
        else:
            stored = cache.k, cache.v
            options: dict[str, Any] = dict(q_offset=step.starts, lengths=step.totals, **rule.mask)
            if cache.k.dtype == q.dtype:
                out = flash_attention(q, *stored, layer=layer, **options)
            else:
                out = flash_attention(q, *(read_layer(x, layer, q.dtype) for x in stored), **options)
        return out, cache

    def append(self, k, v, step: Step, layer) -> DenseCache:
        """Stores rotated keys and values."""
        return DenseCache(
            cache_append(self.k, k, layer, step.starts, counts=step.counts),
            cache_append(self.v, v, layer, step.starts, counts=step.counts),
        )

    @property
    def append_limit(self) -> int | None:
        return None

    @property
    def capacity(self) -> int | None:
        return self.k.shape[-2]


def read_layer(stored: jax.Array, layer, dtype) -> jax.Array:
    """`[B, K, S, D]` in `dtype` of a cache that may be stacked and may hold the bits of bfloat16."""
    if layer is not None:
        stored = jax.lax.dynamic_index_in_dim(stored, layer, 0, keepdims=False)
    return (from_bits(stored, jnp.bfloat16) if stored.dtype == BFLOAT16_BITS else stored).astype(dtype)
