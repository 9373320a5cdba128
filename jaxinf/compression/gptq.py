"""GPTQ: rounding errors are made up for by the rows that are still to be rounded.

Frantar et al. 2022 (arXiv:2210.17323). The error in a product's outputs, of inputs x with moments H = sum x^T x, is
tr(E^T H E) for an error E in the matrix. When row i has been rounded, off by e, the best that the other rows F can
do is to change by

    - H_F^-1[:, i] / H_F^-1[i, i] * e         F: the rows that are not rounded yet, i among them

and the rows of a Cholesky factor U of H^-1 = U^T U hold just these: U[i, i:] / U[i, i] (section 3.3 there).

Rows are taken in falling order of H's diagonal ("act-order"). The scales of groups are chosen before, for the rows
that lie together, so that no order need be stored.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxinf.quant.formats import inverse

BLOCK = 128
"""Rows whose changes reach the rest of the matrix at once, by one product."""
DAMPING = 0.01
"""Of the mean of H's diagonal, added to it; ten times as much where that is not enough to factor it."""


def gptq(
    w: jax.Array,
    gram: jax.Array,
    scales: jax.Array,
    bits: int,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
) -> jax.Array:
    """Codes of a matrix.

    Args:
      w: `[..., K, N]`; leading axes are matrices by themselves.
      gram: float32 `[..., K, K]`, the inputs' sum of x^T x.
      scales: float32 `[..., G, N]`, one for K / G consecutive rows.

    Returns:
      float32 `[..., K, N]`, whole numbers of so many bits.
    """
    lead = w.shape[:-2]
    flat = tuple(x.astype(jnp.float32).reshape(-1, *x.shape[len(lead) :]) for x in (w, gram, scales))
    codes = jax.lax.map(lambda each: _one(each[0], each[1], each[2], bits, act_order, damping), flat)
    return codes.reshape(w.shape)


def _one(w, gram, scales, bits: int, act_order: bool, damping: float) -> jax.Array:
    inner = w.shape[0]
    importance = jnp.diag(gram)
    order = jnp.argsort(-importance) if act_order else jnp.arange(inner)
    steps = jnp.repeat(scales, inner // scales.shape[0], axis=0)[order]
    factor = _factor(gram[order][:, order], damping)
    codes = _compensated(w[order], steps, factor, bits)
    return jnp.zeros_like(codes).at[order].set(codes)


def _factor(gram: jax.Array, damping: float) -> jax.Array:
    """U, upper triangular, with U^T U the inverse of the damped moments."""
    inner = gram.shape[0]
    diagonal = jnp.diag(gram)
    mean = jnp.mean(diagonal)
    # Channels that were never fed, or all of them: their rows neither give nor take.
    scale = jnp.where(mean > 0, mean, 1.0)
    gram = gram / scale + jnp.diag(jnp.where(diagonal > 0, 0.0, 1.0))

    def attempt(damping):
        # From the reverse of a Cholesky factor of the reverse: H = R R^T with R upper, and U = R^-1.
        damped = gram + damping * jnp.eye(inner)
        reverse = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return jax.scipy.linalg.solve_triangular(reverse, jnp.eye(inner), lower=False)

    def failed(state):
        factor, damping = state
        return ~jnp.isfinite(factor).all() & (damping < 1e3)

    return jax.lax.while_loop(failed, lambda s: (attempt(s[1] * 10), s[1] * 10), (attempt(damping), damping))[0]


def _compensated(w: jax.Array, steps: jax.Array, factor: jax.Array, bits: int) -> jax.Array:
    inner, columns = w.shape
    size = max(d for d in range(1, min(BLOCK, inner) + 1) if inner % d == 0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def block(b, state):
        w, codes = state
        start = b * size
        part = jax.lax.dynamic_slice(w, (start, 0), (size, columns))
        step = jax.lax.dynamic_slice(steps, (start, 0), (size, columns))
        own = jax.lax.dynamic_slice(factor, (start, 0), (size, inner))
        square = jax.lax.dynamic_slice(own, (0, start), (size, size))

        def row(i, state):
            part, errors, found = state
            q = jnp.clip(jnp.round(part[i] * inverse(step[i])), low, high)
            error = (part[i] - q * step[i]) / square[i, i]
            later = jnp.where(jnp.arange(size) > i, square[i], 0)
            return part - later[:, None] * error, errors.at[i].set(error), found.at[i].set(q)

        empty = jnp.zeros((size, columns))
        _, errors, found = jax.lax.fori_loop(0, size, row, (part, empty, empty))
        later = jnp.where(jnp.arange(inner) >= start + size, own, 0)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        return w, jax.lax.dynamic_update_slice(codes, found, (start, 0))

    return jax.lax.fori_loop(0, inner // size, block, (w, jnp.zeros_like(w)))[1]


def errors(w: jax.Array, rounded: jax.Array, gram: jax.Array) -> jax.Array:
    """tr(E^T H E) of E = rounded - w, by matrix: what rounding adds to the squares of the outputs, `[...]`."""
    e = (rounded - w).astype(jnp.float32)
    product: jax.Array = partial(jnp.matmul, precision="highest")(gram, e)
    return jnp.sum(e * product, axis=(-2, -1))
