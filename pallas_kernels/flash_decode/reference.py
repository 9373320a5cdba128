"""`flash_decode` by its definition."""

import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.masks import Rules, ring_positions
from pallas_kernels.stored import decode


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    rules: Rules,
    *,
    scale: float,
    softcap: float | None,
    ring: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the T newest tokens over a cache (the formula of `flash_attention`), every score written out.

    Query t of row b is at position lengths[b] - T + t, causally. Slot s of k[layer, b] holds position s, or in a
    ring of S slots the largest p < lengths[b] with p = s modulo S. A quantised cache stands for k * k_scale and
    v * v_scale, one scale for each row, head and slot.
    Returns out in q's dtype and lse in float32.
    """
    k, v = decode(_layer(k, layer)), decode(_layer(v, layer))
    if k_scale is not None:
        k *= _layer(k_scale, layer)[..., None]
    if v_scale is not None:
        v *= _layer(v_scale, layer)[..., None]
    assert rules.lengths is not None
    slots = k.shape[2]
    positions = ring_positions(rules.lengths, slots, jnp.arange(slots)) if ring else None
    out, lse = dense_attention(
        q,
        k,
        v,
        rules,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        positions=positions,
    )
    return out.astype(q.dtype), lse


def _layer(x: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
