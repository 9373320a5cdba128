"""`cache_append` for CPUs and GPUs: each row's slice is read, merged and written back, in place."""

import jax
import jax.numpy as jnp


def xla(
    cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array, counts: jax.Array, *, ring: bool
) -> jax.Array:
    """The same arguments and results as the reference."""
    batch, groups, tokens, dim = new.shape
    slots = cache.shape[3]
    new = new.astype(cache.dtype)
    if ring and tokens > slots:
        skip = jnp.maximum(counts - slots, 0)
        index = jnp.minimum(skip[:, None] + jnp.arange(slots), tokens - 1)
        new = jnp.take_along_axis(new, index[:, None, :, None], axis=2)
        starts, counts, tokens = starts + skip, counts - skip, slots
    size = min(tokens, slots)
    if ring:
        starts = jnp.mod(starts, slots)
    zero = jnp.zeros((), jnp.int32)

    def write(cache, b, start, count):
        """Tokens 0..count-1 of row b at the slots from `start` on; it may lie outside, then less is written."""
        at = jnp.clip(start, 0, slots - size)
        where = (layer, b, zero, at, zero)
        old = jax.lax.dynamic_slice(cache, where, (1, 1, groups, size, dim))
        t = at - start + jnp.arange(size)
        row = jax.lax.dynamic_slice(new, (b, zero, zero, zero), (1, groups, tokens, dim))
        picked = row if tokens == 1 else jnp.take(row, t, axis=2, mode="clip")
        keep = ((t >= 0) & (t < count))[:, None]
        return jax.lax.dynamic_update_slice(cache, jnp.where(keep, picked[None], old), where)

    def row(b, cache):
        cache = write(cache, b, starts[b], counts[b])
        if ring and tokens > 1:
            cache = write(cache, b, starts[b] - slots, counts[b])
        return cache

    return jax.lax.fori_loop(0, batch, row, cache)
