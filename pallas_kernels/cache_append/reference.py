"""`cache_append` by its definition."""

import jax
import jax.numpy as jnp

from pallas_kernels.stored import encode


def reference(
    cache: jax.Array,
    new: jax.Array,
    layer: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    scales: jax.Array | None,
    new_scales: jax.Array | None,
    *,
    ring: bool,
) -> tuple[jax.Array, ...]:
    """Write token t of row b into slot starts[b] + t (modulo S in a ring) of cache[layer, b], for t < counts[b].

    Tokens whose slot is not within 0..S-1 are dropped. Of two tokens of a row with the same slot in a ring, the
    later one stays. cache [L, B, K, S, D], new [B, K, T, D]; new_scales [B, K, T] go to the same slots of scales
    [L, B, K, S]. Returns (cache,), or (cache, scales).
    """
    batch, _, tokens, _ = new.shape
    slots = cache.shape[3]
    t = jnp.arange(tokens)
    target = starts[:, None] + t
    write = t < counts[:, None]
    if ring:
        write &= t >= counts[:, None] - slots
        target = jnp.mod(target, slots)
    target = jnp.where(write & (target >= 0), target, slots)
    rows = jnp.arange(batch)[:, None]

    def put(x: jax.Array, values: jax.Array) -> jax.Array:
        return x.at[layer, rows, :, target].set(jnp.swapaxes(encode(values, x.dtype), 1, 2), mode="drop")

    cache = put(cache, new)
    return (cache,) if scales is None or new_scales is None else (cache, put(scales, new_scales))
