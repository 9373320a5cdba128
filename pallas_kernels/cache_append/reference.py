"""`cache_append` by its definition."""

import jax
import jax.numpy as jnp

from pallas_kernels.stored import encode


def reference(
    cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array, counts: jax.Array, *, ring: bool
) -> jax.Array:
    """Write token t of row b into slot starts[b] + t (modulo S in a ring) of cache[layer, b], for t < counts[b].

    Tokens whose slot is not within 0..S-1 are dropped. Of two tokens of a row with the same slot in a ring, the
    later one stays. cache [L, B, K, S, D], new [B, K, T, D]; returns the cache.
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
    values = jnp.swapaxes(encode(new, cache.dtype), 1, 2)
    return cache.at[layer, rows, :, target].set(values, mode="drop")
