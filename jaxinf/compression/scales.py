"""Scales of groups, chosen by what rounding does to the outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.quant.formats import inverse, split, to_whole

PARTS: np.ndarray = np.asarray([16 / 15, *np.linspace(1, 0.5, 21)], np.float32)
"""Parts of the largest entry of a group that the lowest code may stand for."""


def blocks_of(gram: jax.Array, group: int) -> jax.Array:
    """`[..., K, K]` -> `[..., G, group, group]`: the moments within each group of rows."""
    *lead, inner, _ = gram.shape
    cut = gram.reshape(*lead, inner // group, group, inner // group, group)
    return jnp.moveaxis(jnp.diagonal(cut, axis1=-4, axis2=-2), -1, -3)


def searched(w: jax.Array, gram: jax.Array, group: int, bits: int) -> jax.Array:
    """Scales float32 `[..., G, N]` for a matrix `[..., K, N]` with inputs' moments `[..., K, K]`.

    Of each group and column the one whose rounding to the nearest adds least to the squares of the outputs, as if
    the other groups were exact: the clip search of AWQ (Lin et al. 2023, arXiv:2306.00978, section 3.2).
    """
    grouped = split(w.astype(jnp.float32), group)
    own = blocks_of(gram, group)
    low = -(2 ** (bits - 1))
    at = jnp.argmax(jnp.abs(grouped), axis=-2, keepdims=True)
    largest = jnp.take_along_axis(grouped, at, axis=-2)
    relative = grouped * inverse(largest)

    def error(part: jax.Array) -> jax.Array:
        e = to_whole(relative, part / low, bits) * (part / low) - relative
        return jnp.sum(e * jnp.matmul(own, e, precision="highest"), axis=-2)

    best = jnp.argmin(jax.lax.map(error, jnp.asarray(PARTS)), axis=0)
    return jnp.squeeze(largest, -2) * jnp.asarray(PARTS)[best] / low
