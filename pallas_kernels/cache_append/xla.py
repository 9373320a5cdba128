"""`cache_append` for CPUs and GPUs: each row's slice is read, merged and written back, in place."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.stored import encode, from_bits, to_bits


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames="ring")
def xla(
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
    """The same arguments and results as the reference."""
    cache = _append(cache, new, layer, starts, counts, ring)
    if scales is None or new_scales is None:
        return (cache,)
    return cache, _append(scales, new_scales, layer, starts, counts, ring)


def _append(
    cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array, counts: jax.Array, ring: bool
) -> jax.Array:
    """cache [L, B, K, S, *rest], new [B, K, T, *rest]: a last axis of one number would have XLA copy the cache."""
    batch, groups, tokens, *rest = new.shape
    last = len(rest)
    slots = cache.shape[3]
    dtype = cache.dtype
    cache, new = to_bits(cache), to_bits(encode(new, dtype))
    if ring:
        if tokens > slots:
            skip = jnp.maximum(counts - slots, 0)
            index = jnp.minimum(skip[:, None] + jnp.arange(slots), tokens - 1)
            new = jnp.take_along_axis(new, index.reshape(batch, 1, slots, *[1] * last), axis=2)
            starts, counts, tokens = starts + skip, counts - skip, slots
        starts = jnp.mod(starts, slots)
    size = min(tokens, slots)
    zero = jnp.zeros((), jnp.int32)

    def write(cache, b, start):
        """Row b's tokens at the slots from `start` on, as many as lie within the cache."""
        at = jnp.clip(start, 0, slots - size)
        where = (layer, b, zero, at, *[zero] * last)
        t = at - start + jnp.arange(size)
        old = jax.lax.dynamic_slice(cache, where, (1, 1, groups, size, *rest))
        row = jax.lax.dynamic_slice(new, (b, zero, zero, *[zero] * last), (1, groups, tokens, *rest))
        if tokens > 1:
            row = jnp.take(row, t, axis=2, mode="clip")
        keep = ((t >= 0) & (t < counts[b])).reshape(size, *[1] * last)
        return jax.lax.dynamic_update_slice(cache, jnp.where(keep, row[None], old), where)

    def write_row(b, cache):
        cache = write(cache, b, starts[b])
        if ring and tokens > 1:
            cache = write(cache, b, starts[b] - slots)
        return cache

    return from_bits(jax.lax.fori_loop(0, _rows(starts), write_row, cache), dtype)


def _rows(starts: jax.Array) -> jax.Array:
    """int32 scalar, the rows.

    On a CPU that is not said while compiling: of a loop that runs once for certain XLA makes none, fuses the update
    into whatever reads the cache, and writes the whole cache again for each of these.
    """
    batch = starts.shape[0]

    def untold(starts: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier((jnp.int32(batch), starts))[0]

    return jax.lax.platform_dependent(starts, cpu=untold, default=lambda starts: jnp.int32(batch))
