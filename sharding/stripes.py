"""Stripes: how the tokens of a cache are split over n chips. Token p lies on chip p mod n, in slot p // n.

Rows grow evenly on all chips, whatever their lengths, and which slots are live follows from a row's length alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sharding.collectives import all_to_all, index, size
from sharding.zigzag import AXIS, chunks_of


def slots(lengths: jax.Array, chip: jax.Array, chips: int) -> jax.Array:
    """int32 [B]: how many of the first `lengths` tokens of each row lie on a chip."""
    return (lengths - chip + chips - 1) // chips


def pick(
    x: jax.Array, starts: jax.Array, counts: jax.Array | None, chip: jax.Array, chips: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of tokens that follow `starts`, those that lie on a chip.

    Args:
      x: `[B, H, T, D]`, token t of row b being that row's token starts[b] + t.
      starts: int32 [B]. counts: int32 [B], how many of the T are real; None: all.

    Returns:
      `(tokens [B, H, ceil(T / chips), D], their first slot int32 [B], how many are real int32 [B])`.
    """
    total = x.shape[2]
    each = -(-total // chips)
    first = (chip - starts) % chips
    columns = first[:, None] + chips * jnp.arange(each)
    if total > 1:
        x = jnp.take_along_axis(x, jnp.minimum(columns, total - 1)[:, None, :, None], axis=2)
    real = jnp.full_like(starts, total) if counts is None else counts
    return x, slots(starts, chip, chips), slots(real, first, chips)


def from_zigzag(x: jax.Array, axis: str = AXIS) -> jax.Array:
    """A pass in zig-zag order, `x [B, H, T, D]` a chip, as stripes: the same shape, in order of slots."""
    chips, (batch, heads, tokens, dim) = size(axis), x.shape
    if chips == 1:
        return x
    chunk = tokens // 2
    each = -(-chunk // chips)  # at most, of a chunk's tokens, for one chip
    x = x.reshape(batch, heads, 2, chunk, dim)
    if chunk % chips:
        # Chunk c begins at token c * chunk, which is of chip c * chunk mod chips.
        shift = chunks_of(index(axis), chips)[:, None] * chunk
        first = (jnp.arange(chips) - shift) % chips
        columns = first[:, :, None] + chips * jnp.arange(each)
        columns = jnp.minimum(columns, chunk - 1).reshape(1, 1, 2, -1, 1)
        x = jnp.take_along_axis(x, columns, axis=3).reshape(batch, heads, 2, chips, each, dim)
        x = jnp.moveaxis(x, 3, 0)
    else:
        x = jnp.moveaxis(x.reshape(batch, heads, 2, each, chips, dim), 4, 0)
    x = all_to_all(x, axis, 0, 0)
    x = jnp.concatenate([x[:, :, :, 0], x[::-1, :, :, 1]])  # by chunk: [2 chips, B, H, each, D]
    x = jnp.moveaxis(x, 0, 2).reshape(batch, heads, -1, dim)
    if chunk % chips == 0:
        return x
    position = jnp.arange(tokens) * chips + index(axis)
    origin = position // chunk
    order = (position % chunk - (index(axis) - origin * chunk) % chips) // chips
    return jnp.take(x, origin * each + order, axis=2)
