"""The definition of `grouped_matmul`.

    end[g] = group_sizes[0] + ... + group_sizes[g]
    out[i] = lhs[i] @ rhs[g] * rhs_scale[g]   where end[g-1] <= i < end[g]
    out[i] = 0                                where i >= end[G-1]

with `rhs[g].T` for `rhs[g]` when `transpose`, in float32; with S scales a column, `rhs_scale[g, s]` multiplies the
s-th of S equal parts of K. It gathers a matrix a row, `[M, K, N]` in all, so it
is for small shapes. The grouped product of sorted rows is that of MegaBlocks (Gale et al. 2022,
arXiv:2211.15841), without its padding.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, rhs_scale: jax.Array | None, *, transpose: bool
) -> jax.Array:
    """`[M, K], [G, K, N] or [G, N, K], int32 [G], float32 [G, N], [G, S, N] or None -> [M, N]`, dtype of `lhs`."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])
    group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), rhs.shape[0] - 1)
    valid = (row < ends[-1])[:, None]
    clean = jnp.where(valid, lhs, 0).astype(jnp.float32)
    wide = rhs.astype(jnp.float32)
    if rhs_scale is not None and rhs_scale.ndim == 3:
        by_row = jnp.repeat(rhs_scale, lhs.shape[1] // rhs_scale.shape[1], axis=1)
        wide = wide * (by_row.swapaxes(1, 2) if transpose else by_row)
    out = jnp.einsum("mk,mnk->mn" if transpose else "mk,mkn->mn", clean, wide[group], precision="highest")
    if rhs_scale is not None and rhs_scale.ndim == 2:
        out = out * rhs_scale[group]
    return jnp.where(valid, out, 0).astype(lhs.dtype)
