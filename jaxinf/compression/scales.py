"""Scales of groups, chosen by what rounding does to the outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.quant.formats import split, to_whole

COARSE: np.ndarray = np.asarray([16 / 15, *np.linspace(1, 0.55, 10)], np.float32)
"""Parts of the largest entry of a group that the lowest code may stand for."""
FINE: np.ndarray = np.concatenate([[16 / 15], np.linspace(1, 0.5, 26), -8 / 7 * np.linspace(1, 0.55, 13)]).astype(
    np.float32
)
"""The same, of the opposite sign too, with which the largest entry meets the highest code."""
SWEEPS = 2
"""Over all groups, each with what the others lose."""


def blocks_of(gram: jax.Array, group: int) -> jax.Array:
    """`[..., K, K]` -> `[..., G, group, group]`: the moments within each group of rows."""
    *lead, inner, _ = gram.shape
    cut = gram.reshape(*lead, inner // group, group, inner // group, group)
    return jnp.moveaxis(jnp.diagonal(cut, axis1=-4, axis2=-2), -1, -3)


def searched(w: jax.Array, gram: jax.Array, group: int, bits: int, parts: np.ndarray = FINE) -> jax.Array:
    """Scales float32 `[..., G, N]` for a matrix `[..., K, N]` with inputs' moments `[..., K, K]`.

    Of each group and column the one whose rounding to the nearest adds least to the squares of the outputs, as if
    the other groups were exact: the clip search of AWQ (Lin et al. 2023, arXiv:2306.00978, section 3.2).
    """
    grouped = split(w.astype(jnp.float32), group)
    return _best(grouped, blocks_of(gram, group), jnp.zeros((1,) * grouped.ndim), bits, parts)


def _best(grouped: jax.Array, own: jax.Array, push: jax.Array, bits: int, parts: np.ndarray) -> jax.Array:
    """`[..., G, N]`: the scales with the least e^T own e + 2 e^T push, of an error e `[..., G, group, N]`."""
    low = -(2 ** (bits - 1))
    at = jnp.argmax(jnp.abs(grouped), axis=-2, keepdims=True)
    largest = jnp.take_along_axis(grouped, at, axis=-2)

    def error(part: jax.Array) -> jax.Array:
        scale = largest * (part / low)
        e = to_whole(grouped, scale, bits) * scale - grouped
        return jnp.sum(e * (jnp.matmul(own, e, precision="highest") + 2 * push), axis=-2)

    best = jnp.argmin(jax.lax.map(error, jnp.asarray(parts)), axis=0)
    return jnp.squeeze(largest, -2) * jnp.asarray(parts)[best] / low


def refined(w: jax.Array, gram: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    """Better scales `[..., G, N]` than those of `searched`: each for what the other groups lose with theirs.

    The errors of groups are not independent, as inputs of different channels are not: group by group, the scale is
    taken that adds least to the squares of the outputs together with the errors that are there.
    """
    lead = w.shape[:-2]
    flat = tuple(x.astype(jnp.float32).reshape(-1, *x.shape[len(lead) :]) for x in (w, gram, scales))
    return jax.lax.map(lambda each: _swept(each[0], each[1], each[2], bits), flat).reshape(scales.shape)


def _swept(w: jax.Array, gram: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    groups, columns = scales.shape
    size = w.shape[0] // groups
    grouped = split(w, size)
    blocks = blocks_of(gram, size)

    def lost(grouped, scales):
        return to_whole(grouped, scales[..., None, :], bits) * scales[..., None, :] - grouped

    def visit(i, state):
        scales, errors = state
        g = i % groups
        rows = jax.lax.dynamic_slice_in_dim(gram, g * size, size)
        others = errors.at[g].set(0).reshape(-1, columns)
        push = jnp.matmul(rows, others, precision="highest")
        new = _best(grouped[g], blocks[g], push, bits, FINE)
        return scales.at[g].set(new), errors.at[g].set(lost(grouped[g], new))

    return jax.lax.fori_loop(0, SWEEPS * groups, visit, (scales, lost(grouped, scales)))[0]
