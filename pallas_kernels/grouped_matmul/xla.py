"""`grouped_matmul` in plain XLA.

On a CPU, `jax.lax.ragged_dot` multiplies every row by every matrix, and a dot inside a loop copies the matrix
that it indexes. So the groups that have rows are visited in turn, and each takes its rows in tiles of a few
static sizes, the largest first:

- a tile of one, two or eight rows reads the matrix in place, in its stored dtype (`cpu_products`): a decode
  step pays for its active experts alone, and for their stored bytes, in one layer of a stack too;
- larger tiles first copy the matrix, cast where that is needed, in column blocks, once for all the rows of the
  group, and go to a dot.

A tile may run past its group into the next one, whose own tiles come later and overwrite it. Elsewhere than on
a CPU this is `jax.lax.ragged_dot`, which was lowered for GPU and TPU but has not been run there.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap as sequential

from pallas_kernels import cpu_products
from pallas_kernels.stacks import of_layer
from pallas_kernels.stored import from_bits, to_bits

# Rows a group has on average, up to which its products are small and read the matrix in place.
_SMALL_MEAN = 16
_LARGEST_TILE = 512
_BLOCK_BYTES = 1 << 22


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    rhs_scale: jax.Array | None,
    *,
    transpose: bool,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`[M, K], [G, K, N] or [G, N, K], int32 [G], float32 [G, N] or [G, S, N] or None -> [M, N]`, dtype of `lhs`.

    With a layer the matrices, though not the scales, are stacked along a first axis.
    """
    if rhs_scale is not None and rhs_scale.ndim == 3:
        return _product(lhs, rhs, group_sizes, transpose, layer, rhs_scale).astype(lhs.dtype)
    out = _product(lhs, rhs, group_sizes, transpose, layer)
    if rhs_scale is not None:
        out = out * rhs_scale[_group_of_row(group_sizes, lhs.shape[0])]
    return out.astype(lhs.dtype)


def backward(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    rhs_scale: jax.Array | None,
    dout: jax.Array,
    *,
    transpose: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of lhs, of a floating rhs, and of the scales."""
    weighted, dscale, drhs = dout, None, None
    if rhs_scale is not None and rhs_scale.ndim == 3:
        dlhs = _product(dout, _scaled(rhs, rhs_scale, transpose), group_sizes, not transpose).astype(lhs.dtype)
        outer = _outer(lhs, dout, group_sizes) * (rhs.swapaxes(1, 2) if transpose else rhs).astype(jnp.float32)
        return dlhs, None, jnp.sum(outer.reshape(*rhs_scale.shape[:2], -1, outer.shape[2]), axis=2)
    if rhs_scale is not None:
        group = _group_of_row(group_sizes, lhs.shape[0])
        weighted = (dout * rhs_scale[group]).astype(dout.dtype)
        dscale = jnp.zeros_like(rhs_scale).at[group].add(_product(lhs, rhs, group_sizes, transpose) * dout)
    dlhs = _product(weighted, rhs, group_sizes, not transpose).astype(lhs.dtype)
    if jnp.issubdtype(rhs.dtype, jnp.floating):
        left, right = (weighted, lhs) if transpose else (lhs, weighted)
        drhs = _outer(left, right, group_sizes).astype(rhs.dtype)
    return dlhs, drhs, dscale


def _group_of_row(group_sizes, rows):
    """Group of each row; the last one for rows beyond the total."""
    before = jnp.arange(rows)[:, None] >= jnp.cumsum(group_sizes)
    return jnp.minimum(jnp.sum(before, axis=1), group_sizes.shape[0] - 1)


def _scaled(matrices, scale, transpose):
    """float32 `[..., K, N]`, or transposed: matrices times `scale [..., S, N]` of S equal parts of K."""
    by_row = jnp.repeat(scale, matrices.shape[-1 if transpose else -2] // scale.shape[-2], axis=-2)
    return matrices.astype(jnp.float32) * (by_row.swapaxes(-1, -2) if transpose else by_row)


def _product(lhs, rhs, group_sizes, transpose, layer=None, scale=None):
    """float32 `lhs[i] @ rhs[g]` (or `rhs[g].T`), 0 beyond the total; scale: `[G, S, N]`, of a narrow rhs."""
    if 0 in (*lhs.shape, *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[-2 if transpose else -1]), jnp.float32)
    return jax.lax.platform_dependent(
        lhs,
        rhs,
        group_sizes,
        layer,
        scale,
        cpu=partial(_product_on_cpu, transpose=transpose),
        # Under vmap one call at a time: the ragged dot has no rule for a batch of rows with shared matrices.
        default=sequential(partial(_ragged_product, transpose=transpose)),
    )


def _outer(left, right, group_sizes):
    """float32 `left[rows of g].T @ right[rows of g]`, `[G, K, N]`."""
    if 0 in (*left.shape, *right.shape):
        return jnp.zeros((group_sizes.shape[0], left.shape[1], right.shape[1]), jnp.float32)
    return jax.lax.platform_dependent(
        left, right, group_sizes, cpu=_outer_on_cpu, default=sequential(_ragged_outer)
    )


def _precision(dtype):
    return "highest" if dtype == jnp.float32 else None


def _common_dtype(lhs, rhs):
    return lhs.dtype if rhs.dtype in (jnp.int8, jnp.int4) else jnp.promote_types(lhs.dtype, rhs.dtype)


def _ragged_product(lhs, rhs, group_sizes, layer, scale, *, transpose):
    rhs = of_layer(rhs, layer)
    dtype = _common_dtype(lhs, rhs)
    rhs = rhs if scale is None else _scaled(rhs, scale, transpose)
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    valid = (jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes))[:, None]
    out = jax.lax.ragged_dot_general(
        jnp.where(valid, lhs, 0).astype(dtype),
        rhs.astype(dtype),
        group_sizes,
        dimensions,
        precision=_precision(dtype),
        preferred_element_type=jnp.float32,
    )
    return jnp.where(valid, out, 0)


def _ragged_outer(left, right, group_sizes):
    dtype = jnp.promote_types(left.dtype, right.dtype)
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    valid = (jnp.arange(left.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jax.lax.ragged_dot_general(
        jnp.where(valid, left, 0).astype(dtype),
        jnp.where(valid, right, 0).astype(dtype),
        group_sizes,
        dimensions,
        precision=_precision(dtype),
        preferred_element_type=jnp.float32,
    )


def _visit_groups(group_sizes, rows, visit: Callable, carry):
    """`carry = visit(g, first row, end, carry)` for each group that has rows; also returns the total."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), rows)

    def step(state):
        row, carry = state
        g = jnp.sum(ends <= row, dtype=jnp.int32)
        return ends[g], visit(g, row, ends[g], carry)

    _, carry = jax.lax.while_loop(lambda state: state[0] < ends[-1], step, (jnp.int32(0), carry))
    return carry, ends[-1]


def _tiles(sizes: tuple[int, ...], floor: int, row, end, visit: Callable, carry):
    """`carry = visit(size, row, carry)` over rows up to `end`, while more than `floor` of them are left.

    A size is used while it leaves fewer rows empty than the next size has.
    """
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
        least = max(size - smaller, floor) if smaller else floor

        def step(state, size=size):
            row, carry = state
            return row + size, visit(size, row, carry)

        row, carry = jax.lax.while_loop(lambda state, least=least: end - state[0] > least, step, (row, carry))
    return row, carry


def _plan(rows: int, groups: int, in_place: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the tiles that go to a dot and of those that read the matrix in place."""
    mean = -(-rows // groups)
    if in_place and mean <= _SMALL_MEAN:
        small = tuple(s for s in (8, 2, 1) if s == 1 or s <= max(rows, 1))
        return ((32,) if rows > 24 else ()), small
    top = min(_LARGEST_TILE, max(32, 1 << (mean.bit_length() - 1)))
    return tuple(s for s in (top, top // 4, top // 16) if s >= 8), ()


def _product_on_cpu(lhs, rhs, group_sizes, layer, scale, *, transpose):
    (rows, inner), (height, breadth) = lhs.shape, rhs.shape[-2:]
    columns, groups = height if transpose else breadth, group_sizes.shape[0]
    before = 0 if layer is None else layer * groups
    plain = scale is None and rhs.dtype != jnp.int4
    large, small = _plan(rows, groups, plain and cpu_products.can_fuse(inner, transpose))
    dtype = jnp.dtype(jnp.float32) if lhs.dtype == jnp.float16 else _common_dtype(lhs, rhs)
    margin = max(large + small)
    padded = jnp.pad(lhs, ((0, margin), (0, 0)))
    exact, cast = padded.astype(jnp.float32), to_bits(padded.astype(dtype))
    width = min(columns, max(128, _BLOCK_BYTES // (inner * dtype.itemsize) // 128 * 128))

    def matrix(g, row, part=0, parts=1):
        """One of so many equal parts of a group's matrix, along its first axis."""
        # Tied to the loop: what depends on no row is hoisted out of it, for all the matrices at once.
        fenced, _ = jax.lax.optimization_barrier((rhs, row))
        stack = to_bits(fenced).reshape(-1, height // parts, breadth)
        return jax.lax.dynamic_index_in_dim(stack, (before + g) * parts + part, keepdims=False)

    def dots(g, row, end, out):
        def block(state):
            i, out = state
            first = jnp.minimum(i * width, columns - width)
            w = jax.lax.dynamic_slice_in_dim(matrix(g, i), first, width, 0 if transpose else 1)
            w = from_bits(w, rhs.dtype)
            if scale is not None:
                own = jax.lax.dynamic_index_in_dim(scale, g, keepdims=False)
                w = _scaled(w, jax.lax.dynamic_slice_in_dim(own, first, width, 1), transpose)
            w = w.astype(dtype)

            def tile(size, row, out):
                x = from_bits(jax.lax.dynamic_slice_in_dim(cast, row, size), dtype)
                contract = (((1,), (1 if transpose else 0,)), ((), ()))
                y = jax.lax.dot_general(
                    x, w, contract, precision=_precision(dtype), preferred_element_type=jnp.float32
                )
                return jax.lax.dynamic_update_slice(out, y, (row, first))

            return i + 1, _tiles(large, floor, row, end, tile, out)[1]

        floor = 24 if small else 0
        blocks = jnp.where(end - row > floor, -(-columns // width), 0)
        _, out = jax.lax.while_loop(lambda state: state[0] < blocks, block, (jnp.int32(0), out))
        taken = -(-(end - row - floor) // large[0]) * large[0] if small else end - row
        return row + jnp.where(blocks > 0, taken, 0), out

    def in_place(g, row, end, out):
        def tile(size, row, out):
            x = jax.lax.dynamic_slice_in_dim(exact, row, size)
            if size == 1 and cpu_products.can_halve((height, breadth), rhs.dtype, transpose):
                halves = [matrix(g, row, part, 2) for part in (0, 1)]
                y = cpu_products.one_row(x, halves, rhs.dtype, transposed=transpose)
            else:
                y = cpu_products.few_rows(x, matrix(g, row), rhs.dtype, transposed=transpose)
            return jax.lax.dynamic_update_slice_in_dim(out, y, row, 0)

        return _tiles(small, 0, row, end, tile, out)[1]

    def visit(g, row, end, out):
        if large:
            row, out = dots(g, row, end, out)
        return in_place(g, row, end, out) if small else out

    out = jnp.zeros((rows + margin, columns), jnp.float32)
    out, total = _visit_groups(group_sizes, rows, visit, out)
    return jnp.where(jnp.arange(rows)[:, None] < total, out[:rows], 0)


def _outer_on_cpu(left, right, group_sizes):
    rows, dtype = left.shape[0], jnp.promote_types(left.dtype, right.dtype)
    dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
    sizes, _ = _plan(rows, group_sizes.shape[0], False)
    left, right = (to_bits(jnp.pad(a.astype(dtype), ((0, sizes[0]), (0, 0)))) for a in (left, right))

    def visit(g, row, end, grad):
        def tile(size, row, total):
            mine = (row + jnp.arange(size) < end)[:, None]
            x, y = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, row, size), 0) for a in (left, right))
            part = jax.lax.dot_general(
                from_bits(x, dtype),
                from_bits(y, dtype),
                (((0,), (0,)), ((), ())),
                precision=_precision(dtype),
                preferred_element_type=jnp.float32,
            )
            return total + part

        zero = jnp.zeros((left.shape[1], right.shape[1]), jnp.float32)
        _, total = _tiles(sizes, 0, row, end, tile, zero)
        return jax.lax.dynamic_update_index_in_dim(grad, total, g, 0)

    grad = jnp.zeros((group_sizes.shape[0], left.shape[1], right.shape[1]), jnp.float32)
    return _visit_groups(group_sizes, rows, visit, grad)[0]
