"""Rows through the experts that serve them, and the sums of what the experts make of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""From rows `[M, d]` sorted by expert, int32 `[E]` rows an expert and int32 `[M]` the expert of each row to
`[M, d]` in the rows' dtype. Rows past the sum belong to none; what they become is not used, but must be finite."""


def by_rows(
    rows: jax.Array,
    local: jax.Array,
    weights: jax.Array,
    compute: Compute,
    *,
    experts: int,
    bias: jax.Array | None = None,
    count: jax.Array | None = None,
    window: int | None = None,
    dtype=None,
) -> jax.Array:
    """The weighed sum of what its experts make of each row.

    Args:
      rows: `[R, d]`.
      local: int32 `[R, k]`, the experts of each row: 0 to `experts`-1, and `experts` where there is none. A row
        without any may hold anything.
      weights: float32 `[R, k]`.
      bias: `[experts, d]`, added to each expert's output.
      count: int32 scalar, the first so many rows have experts; None: any may.
      window: rows that are served at a time, to bound memory (static); only as many windows as hold `count` rows
        are. It makes a loop of unknown length, which has no reverse derivative; None: all at once.
      dtype: of the result; default float32, in which the sums run.

    Returns:
      `[R, d]`; rows past the last window of `count` are 0.
    """
    total, dtype = rows.shape[0], jnp.float32 if dtype is None else dtype

    def serve(rows, local, weights):
        r, k = local.shape
        owner, order, sizes = _sorted(local.reshape(-1), experts)
        y = compute(jnp.take(rows, order // k, axis=0, mode="clip"), sizes, jnp.minimum(owner, experts - 1))
        y = jnp.take(y, jnp.argsort(order), axis=0, mode="clip").reshape(r, k, -1)
        weights = jnp.where(local < experts, weights, 0)
        out = jnp.sum(y.astype(jnp.float32) * weights[:, :, None], axis=1)
        if bias is not None:
            shares = jnp.sum(jnp.where(local[:, :, None] == jnp.arange(experts), weights[:, :, None], 0), axis=1)
            out = out + jnp.dot(shares, bias.astype(jnp.float32), precision="highest")
        return out.astype(dtype)

    if count is None or window is None or window >= total:
        return serve(rows, local, weights)

    def one(i, out):
        start = jnp.minimum(i * window, total - window)
        parts = (jax.lax.dynamic_slice_in_dim(part, start, window) for part in (rows, local, weights))
        return jax.lax.dynamic_update_slice_in_dim(out, serve(*parts), start, 0)

    return jax.lax.fori_loop(0, -(-count // window), one, jnp.zeros((total, rows.shape[1]), dtype))


def by_pairs(
    rows: jax.Array,
    token: jax.Array,
    owner: jax.Array,
    weights: jax.Array,
    compute: Compute,
    *,
    experts: int,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The same from a list of pairs, where a row may have any number of experts.

    Args:
      rows: `[R, d]`.
      token: int32 `[P]`, the row of each pair; owner: int32 `[P]`, its expert, `experts` where the pair is none.
      weights: float32 `[P]`.

    Returns:
      float32 `[R, d]`.
    """
    owner, order, sizes = _sorted(owner, experts)
    token, real, owner = jnp.take(token, order), owner < experts, jnp.minimum(owner, experts - 1)
    y = compute(jnp.take(rows, token, axis=0, mode="clip"), sizes, owner).astype(jnp.float32)
    if bias is not None:
        y = y + jnp.take(bias, owner, axis=0).astype(jnp.float32)
    y = jnp.where(real[:, None], y * jnp.take(weights, order)[:, None], 0)
    return jnp.zeros(rows.shape, jnp.float32).at[jnp.where(real, token, rows.shape[0])].add(y, mode="drop")


def _sorted(owner: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs by expert: the sorted owners, the order, and how many each expert has; those of none are last."""
    owner, order = jax.lax.sort((owner, jnp.arange(owner.shape[0], dtype=jnp.int32)), num_keys=1)
    # By comparisons: a TPU takes ten times as long for a scatter of single numbers.
    sizes = jnp.sum(owner[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return owner, order, sizes
