"""`flash_decode` for CPUs and GPUs: one pass over the live part of the cache, a block of slots at a time.

Blocks are cut straight out of the stacked cache, so no layer is ever copied, and quantised or bfloat16 values
become float32 one block at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.flash_decode.blocks import Blocks, default_blocks
from pallas_kernels.masks import Rules, distances, ring_positions, visible
from pallas_kernels.stored import read_slice


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames=("scale", "softcap", "ring", "blocks"))
def xla(
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
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same maths, arguments and results as the reference."""
    batch, heads, tokens, dim = q.shape
    groups, slots = k.shape[2:4]
    share = heads // groups
    size = min((blocks or default_blocks(slots)).kv, slots)
    count = -(-slots // size)
    t = jnp.arange(tokens)
    rows = (scale * q.astype(jnp.float32)).reshape(batch, groups, share * tokens, dim)
    shape = (batch, groups, share, tokens)
    lengths = rules.lengths
    assert lengths is not None

    def step(j, state):
        """One more block of slots: running maximum, sum and weighted values."""
        peak, total, acc = state
        start = jnp.minimum(j * size, slots - size)
        s = start + jnp.arange(size)
        positions = ring_positions(lengths, slots, s) if ring else s[None]
        if slots % size:
            positions = jnp.where(s >= j * size, positions, -1)
        k_block, v_block = (_block(x, layer, start, size) for x in (k, v))
        x = _dot("bkrd,bksd->bkrs", rows, k_block)
        if k_scale is not None:
            x *= _block(k_scale, layer, start, size)[:, :, None]
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        x = x.reshape(*shape, size)
        if alibi_slopes is not None:
            far = distances(rules, t, positions)[:, None, None].astype(jnp.float32)
            x += alibi_slopes.reshape(groups, share, 1, 1) * far
        seen = visible(rules, t, s, positions)
        assert seen is not None
        x = jnp.where(seen[:, :, None], x, -jnp.inf)
        new_peak = jnp.maximum(peak, x.max(-1))
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights = jnp.exp(x - base[..., None])
        fade = jnp.exp(peak - base)
        total = total * fade + weights.sum(-1)
        # Hidden slots may hold nan, and 0 * nan is nan.
        used = seen.any(2)
        weights = weights.reshape(batch, groups, share * tokens, size)
        if v_scale is not None:
            weights *= jnp.where(used, _block(v_scale, layer, start, size), 0)[:, :, None]
        v_block = jnp.where(used[..., None], v_block, 0)
        part = _dot("bkrs,bksd->bkrd", weights, v_block)
        acc = acc * fade.reshape(batch, groups, share * tokens, 1) + part
        return new_peak, total, acc

    if sinks is None:
        peak, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    else:
        peak = jnp.broadcast_to(sinks.reshape(groups, share, 1), shape)
        total = jnp.ones(shape)
    state = (peak, total, jnp.zeros((batch, groups, share * tokens, v.shape[-1])))
    if count == 1:
        state = step(0, state)
    else:
        first = 0
        if rules.left is not None and not ring:
            oldest = jnp.where(lengths > 0, lengths, slots + tokens) - tokens - rules.left
            first = jnp.clip(oldest.min(), 0, slots) // size
        live = jnp.clip(lengths.max(), 0, slots)
        state = jax.lax.fori_loop(first, -(-live // size), step, state)
    peak, total, acc = state
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = acc.reshape(*shape, -1) / total[..., None]
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
    return out.reshape(batch, heads, tokens, -1).astype(q.dtype), lse.reshape(batch, heads, tokens)


def _block(x: jax.Array, layer: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Slots start..start+size-1 of x[layer] in float32, cut from the stack in one read."""
    zero = jnp.zeros((), jnp.int32)
    starts = (layer, zero, zero, start, *[zero] * (x.ndim - 4))
    return read_slice(x, starts, (1, *x.shape[1:3], size, *x.shape[4:]))[0]


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
