"""Zig-zag order: how the tokens of a long pass are split over the chips of `sequence`.

A pass of T tokens is cut into 2s chunks for s chips; chip i has the chunks i and 2s-1-i. Under a causal mask an
early chunk sees few keys and a late one many, so each chip has the same work. Brandon et al. 2023 (Striped
Attention) balance the ring by interleaving tokens; this order, of whole chunks, is that of Llama 3's context
parallelism (Dubey et al. 2024, section 3.3.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import InputError
from sharding.collectives import index, psum, size

AXIS = "sequence"


def padded(total: int, chips: int) -> int:
    """The least multiple of 2 * chips that is at least `total`."""
    return total + -total % (2 * chips)


def zigzag_positions(total: int, chips: int) -> np.ndarray:
    """int32 [chips, total / chips]: which tokens each chip has, in its order.

    Raises:
      InputError: `total` is no multiple of 2 * chips.
    """
    if total % (2 * chips):
        raise InputError(
            f"total={total} tokens do not cut into 2 * {chips} chunks: pad them to {padded(total, chips)}"
        )
    chunks = np.arange(total, dtype=np.int32).reshape(2 * chips, -1)
    return np.concatenate([chunks[:chips], chunks[chips:][::-1]], axis=1)


def to_zigzag(x: jax.Array, chips: int, axis: int = 1) -> jax.Array:
    """`x` padded with zeros along `axis` to a multiple of 2 * chips and reordered: part i of it is chip i's."""
    total = x.shape[axis]
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, padded(total, chips) - total)
    return jnp.take(jnp.pad(x, pads), zigzag_positions(padded(total, chips), chips).reshape(-1), axis=axis)


def from_zigzag(x: jax.Array, chips: int, axis: int = 1, total: int | None = None) -> jax.Array:
    """The inverse of `to_zigzag`; `total`: tokens before padding, default: all."""
    order = np.argsort(zigzag_positions(x.shape[axis], chips).reshape(-1))
    return jnp.take(x, order[:total], axis=axis)


def splits(total: int, begins: bool, axis: str = AXIS) -> bool:
    """Whether a pass of `total` tokens is split over the axis: if it `begins` its rows, and has more than one."""
    return begins and total > 1 and size(axis) > 1


def chunks_of(chip: jax.Array, chips: int) -> jax.Array:
    """int32 [2]: the chunks that a chip has."""
    return jnp.stack([chip, 2 * chips - 1 - chip])


def local_positions(tokens: int, axis: str = AXIS) -> jax.Array:
    """int32 [tokens]: positions of this chip's tokens, within a program."""
    chips = size(axis)
    starts = chunks_of(index(axis), chips) * (tokens // 2)
    return (starts[:, None] + jnp.arange(tokens // 2, dtype=jnp.int32)).reshape(-1)


def share(x: jax.Array, dim: int = 1, axis: str = AXIS) -> jax.Array:
    """This chip's tokens of an array that all chips of the axis have whole, padded with zeros to 2s chunks."""
    chips = size(axis)
    pads = [(0, 0)] * x.ndim
    pads[dim] = (0, padded(x.shape[dim], chips) - x.shape[dim])
    x = jnp.pad(x, pads)
    each = x.shape[dim] // (2 * chips)
    low, high = chunks_of(index(axis), chips) * each
    parts = [jax.lax.dynamic_slice_in_dim(x, start, each, dim) for start in (low, high)]
    return jnp.concatenate(parts, axis=dim)


def whole(x: jax.Array, dim: int = 1, axis: str = AXIS, total: int | None = None) -> jax.Array:
    """The inverse of `share`: all chips' tokens in order, on every chip."""
    chips = size(axis)
    if chips == 1:
        return x
    gathered = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return from_zigzag(gathered, chips, dim, total)


def place(position: jax.Array, tokens: int, chips: int) -> tuple[jax.Array, jax.Array]:
    """`(chip, local column)` of the token at each position (int32, any shape), `tokens` columns a chip."""
    each = tokens // 2
    chunk = position // each
    late = chunk >= chips
    return jnp.where(late, 2 * chips - 1 - chunk, chunk), position % each + jnp.where(late, each, 0)


def last_token(lengths: jax.Array, tokens: int, chips: int) -> tuple[jax.Array, jax.Array]:
    """`(chip, local column)`, int32 [B] each, of each row's last real token; of the first column in an empty row.

    lengths: int32 [B], real tokens of the rows over all chips; tokens: columns a chip.
    """
    return place(jnp.maximum(lengths - 1, 0), tokens, chips)


def take(x: jax.Array, positions: jax.Array, dim: int, axis: str = AXIS) -> jax.Array:
    """The tokens at `positions` int32 [B, M] of every row, on every chip: `x [B, .., T local, ..]` with M for T.

    What lies at a position outside the pass is 0.
    """
    chips, tokens = size(axis), x.shape[dim]
    owner, column = place(positions, tokens, chips) if chips > 1 else (jnp.zeros_like(positions), positions)
    mine = (owner == index(axis)) & (positions >= 0) & (positions < chips * tokens)
    shape = [1] * x.ndim
    shape[0], shape[dim] = positions.shape
    found = jnp.take_along_axis(x, jnp.where(mine, column, 0).reshape(shape), axis=dim)
    return psum(jnp.where(mine.reshape(shape), found, jnp.zeros((), x.dtype)), axis)


def take_last(x: jax.Array, lengths: jax.Array, axis: str = AXIS) -> jax.Array:
    """`x [B, T local, d]` -> `[B, d]`: each row's last real token, on every chip."""
    return take(x, jnp.maximum(lengths - 1, 0)[:, None], 1, axis)[:, 0]
