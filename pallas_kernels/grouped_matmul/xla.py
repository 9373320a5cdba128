"""`grouped_matmul` in plain XLA: row tiles that each belong to one group, walked by a bounded loop."""

from functools import partial

import jax
import jax.numpy as jnp


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, rhs_scale: jax.Array | None = None
) -> jax.Array:
    """`[M, K], [G, K, N], int32 [G], float32 [G, N] or None -> [M, N]` in the dtype of `lhs`."""
    return _grouped(lhs, rhs, group_sizes, rhs_scale)


@jax.custom_vjp
def _grouped(lhs, rhs, group_sizes, rhs_scale):
    return _forward(lhs, rhs, group_sizes, rhs_scale, transpose=False, tile=_tile(lhs.shape[0], rhs.shape[0]))


def _grouped_fwd(lhs, rhs, group_sizes, rhs_scale):
    return _grouped(lhs, rhs, group_sizes, rhs_scale), (lhs, rhs, group_sizes, rhs_scale)


def _grouped_bwd(saved, dout):
    lhs, rhs, group_sizes, rhs_scale = saved
    tile = _tile(lhs.shape[0], rhs.shape[0])
    weighted, dscale = dout, None
    if rhs_scale is not None:
        group, _ = _groups_of_rows(group_sizes, lhs.shape[0])
        weighted = (dout * rhs_scale[group]).astype(dout.dtype)
        plain = _forward(lhs, rhs, group_sizes, None, transpose=False, tile=tile)
        products = plain.astype(jnp.float32) * dout.astype(jnp.float32)
        dscale = jnp.zeros_like(rhs_scale).at[group].add(products)
    dlhs = _forward(weighted, rhs, group_sizes, None, transpose=True, tile=tile)
    drhs = None
    if jnp.issubdtype(rhs.dtype, jnp.floating):
        drhs = _weight_gradient(lhs, dout, group_sizes, tile=tile).astype(rhs.dtype)
    return dlhs, drhs, None, dscale


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _tile(rows: int, groups: int) -> int:
    mean = max(1, rows // groups)
    return min(256, max(8, 1 << (mean - 1).bit_length()), max(1, rows))


def _groups_of_rows(group_sizes, rows):
    """Group of each row (the last group for rows beyond the total) and which rows belong to one."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)
    group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), group_sizes.shape[0] - 1)
    return group, row < ends[-1]


def _plan(group_sizes, rows, tile):
    """Bounds of the groups and the index of the first tile of each; the last entry counts the tiles."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), rows)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    tiles = jnp.cumsum((ends - starts + tile - 1) // tile)
    return starts, ends, tiles


@partial(jax.jit, static_argnames=("transpose", "tile"))
def _forward(lhs, rhs, group_sizes, rhs_scale, *, transpose, tile):
    rows, precision = lhs.shape[0], "highest" if lhs.dtype == jnp.float32 else None
    starts, ends, tiles = _plan(group_sizes, rows, tile)
    padded = jnp.pad(lhs, ((0, tile), (0, 0)))
    columns = rhs.shape[1] if transpose else rhs.shape[2]

    def body(carry):
        t, out = carry
        g = jnp.searchsorted(tiles, t, side="right")
        before = jnp.where(g == 0, 0, tiles[g - 1])
        first = starts[g] + (t - before) * tile
        x = jax.lax.dynamic_slice_in_dim(padded, first, tile)
        w = jax.lax.dynamic_index_in_dim(rhs, g, keepdims=False).astype(lhs.dtype)
        contract = (((1,), (1 if transpose else 0,)), ((), ()))
        y = jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
        if rhs_scale is not None:
            y = y * rhs_scale[g]
        # The tail of a tile may run into the next group, whose own tile comes later and overwrites it.
        out = jax.lax.dynamic_update_slice_in_dim(out, y.astype(lhs.dtype), first, 0)
        return t + 1, out

    out = jnp.zeros((rows + tile, columns), lhs.dtype)
    _, out = jax.lax.while_loop(lambda c: c[0] < tiles[-1], body, (jnp.int32(0), out))
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out[:rows], 0)


@partial(jax.jit, static_argnames=("tile",))
def _weight_gradient(lhs, dout, group_sizes, *, tile):
    rows, precision = lhs.shape[0], "highest" if lhs.dtype == jnp.float32 else None
    starts, ends, tiles = _plan(group_sizes, rows, tile)
    x_all, d_all = jnp.pad(lhs, ((0, tile), (0, 0))), jnp.pad(dout, ((0, tile), (0, 0)))

    def body(carry):
        t, grad = carry
        g = jnp.searchsorted(tiles, t, side="right")
        before = jnp.where(g == 0, 0, tiles[g - 1])
        first = starts[g] + (t - before) * tile
        mine = (first + jnp.arange(tile) < ends[g])[:, None]
        x = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x_all, first, tile), 0)
        d = jnp.where(mine, jax.lax.dynamic_slice_in_dim(d_all, first, tile), 0)
        part = jax.lax.dot_general(
            x, d, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        return t + 1, grad.at[g].add(part)

    grad = jnp.zeros((group_sizes.shape[0], lhs.shape[1], dout.shape[1]), jnp.float32)
    return jax.lax.while_loop(lambda c: c[0] < tiles[-1], body, (jnp.int32(0), grad))[1]
