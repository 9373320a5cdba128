"""`grouped_matmul` as a TPU kernel: matrices stream through VMEM, one visit for each group in each tile of rows."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import current
from pallas_kernels.grouped_matmul.blocks import Blocks, Problem, chunk, folds, scales_of, stays, vmem_bytes
from pallas_kernels.vmem import limit, up


class Visits(NamedTuple):
    """What the kernel does, in order: int32 arrays of one entry a visit, of which the first `count` are meant."""

    tile: jax.Array  # of rows
    group: jax.Array  # whose matrix is in VMEM
    first: jax.Array  # row of the tile
    end: jax.Array
    belongs: jax.Array  # 1: the rows belong to the group; 0: they belong to none and become zeros
    count: jax.Array


def plan(group_sizes: jax.Array, rows: int, tile: int) -> Visits:
    """The visits of `rows` rows in tiles of `tile`.

    Rows past the sum are a group of their own, which needs no matrix. All are sums over comparisons, which XLA
    fuses: cumulative sums and scatters would be programs of their own, as slow as a small expert.
    """
    groups, tiles = group_sizes.shape[0], -(-rows // tile)
    index = jnp.arange(groups + 1)
    before = index[:, None] > jnp.arange(groups)
    starts = jnp.minimum(jnp.sum(jnp.where(before, group_sizes, 0), axis=1), rows)
    ends = jnp.concatenate([starts[1:], jnp.full(1, rows, starts.dtype)])
    # `lax.div`: dividing what is not negative needs no rounding towards minus infinity.
    tile_of = jax.lax.div(starts, jnp.int32(tile))
    counts = jnp.where(ends > starts, jax.lax.div(ends - 1, jnp.int32(tile)) - tile_of + 1, 0)
    done = jnp.sum(jnp.where(index[:, None] >= index, counts, 0), axis=1)
    # The last group of rows that have one keeps its matrix while the rest become zeros.
    last = jnp.max(jnp.where(counts[:groups] > 0, index[:groups], 0))
    visit = jnp.arange(groups + tiles)
    owner = jnp.minimum(jnp.sum(visit[:, None] >= done, axis=1), groups)
    mine = owner[:, None] == index

    def of_owner(values):
        return jnp.sum(jnp.where(mine, values, 0), axis=1)

    which = of_owner(tile_of - done + counts) + visit
    low = jnp.maximum(of_owner(starts) - which * tile, 0)
    high = jnp.minimum(of_owner(ends) - which * tile, tile)
    arrays = jnp.clip(which, 0, tiles - 1), jnp.minimum(owner, last), low, high, owner < groups, done[-1]
    return Visits(*(a.astype(jnp.int32) for a in arrays))


def pallas(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    rhs_scale: jax.Array | None,
    layer: jax.Array | None = None,
    *,
    problem: Problem,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:
    """`[M, K], [G, K, N] or [G, N, K], int32 [G], float32 [G, N] or [G, S, N] or None -> [M, N]`, dtype of `lhs`.

    With a layer, matrices and scales are stacked along a first axis and are read where they lie.
    """
    p, b = problem, blocks
    rows = up(p.rows, p.align)
    lhs = jnp.pad(lhs, ((0, rows - p.rows), (0, 0))) if rows > p.rows else lhs
    visits = plan(group_sizes, rows, b.m)
    if layer is not None:
        rhs = rhs.reshape(-1, *rhs.shape[2:])
        rhs_scale = None if rhs_scale is None else rhs_scale.reshape(-1, *rhs_scale.shape[2:])
        visits = visits._replace(group=visits.group + layer * p.groups)
    if p.transpose:
        matrix = pl.BlockSpec((None, b.n, b.k), lambda j, i, l, *v: (v[1][i], j, l))
    else:
        matrix = pl.BlockSpec((None, b.k, b.n), lambda j, i, l, *v: (v[1][i], l, j))
    once = pl.Buffered(1) if stays(p, b) else None
    tile = pl.BlockSpec((b.m, b.k), lambda j, i, l, *v: (v[0][i], l), pipeline_mode=once)
    operands = [(lhs, tile), (rhs, matrix)]
    if rhs_scale is not None:
        several = p.scales > 1
        scale = pl.BlockSpec((None, scales_of(p, b), b.n), lambda j, i, l, *v: (v[1][i], l if several else 0, j))
        operands.append((rhs_scale if rhs_scale.ndim == 3 else rhs_scale[:, None, :], scale))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(pl.cdiv(p.columns, b.n), visits.count, p.inner // b.k),
        in_specs=[spec for _, spec in operands],
        out_specs=pl.BlockSpec((b.m, b.n), lambda j, i, l, *v: (v[0][i], j)),
        scratch_shapes=[pltpu.VMEM((b.m, b.n), jnp.float32)] if b.k < p.inner else [],
    )
    out = pl.pallas_call(
        partial(_body, problem=p, blocks=b),
        out_shape=jax.ShapeDtypeStruct((rows, p.columns), lhs.dtype),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=limit(current(), vmem_bytes(p, b)),
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*visits[:-1], *(operand for operand, _ in operands))
    return out[: p.rows]


def _body(tile, group, first, end, belongs, x, w, *operands, problem: Problem, blocks: Blocks):
    del tile, group
    p, b = problem, blocks
    refs: list[Any] = list(operands)
    scale: Any = refs.pop(0) if len(refs) > 1 + (b.k < p.inner) else None
    out = refs.pop(0)
    total: Any = refs.pop(0) if refs else None
    visit, step, last = pl.program_id(1), pl.program_id(2), p.inner // b.k - 1
    low, high = first[visit], end[visit]

    def store(at, size, columns, start, values):
        """Writes those of `size` rows from `at` that are mine; rows before `start` are done."""
        row = at + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        mine = (row >= jnp.maximum(low, start)) & (row < high)
        where = pl.ds(at, size), columns
        out[where] = jnp.where(mine, values.astype(jnp.float32), out[where].astype(jnp.float32)).astype(out.dtype)

    def product(begin, size):
        """What takes window i of `size` rows, counted from row `begin`, through the matrix."""
        width = chunk(b, size)

        def window(i, carry):
            start = begin + i * size
            # The last window is moved up where it would leave the tile; its first rows were done before.
            at = pl.multiple_of(jnp.minimum(start, b.m - size), p.align)

            def part(columns):
                rows = pl.ds(at, size)
                if p.scales > 1 and not folds(p):
                    y = _by_part(p, b, x, rows, w, columns, scale)
                else:
                    matrix = w[columns, :] if p.transpose else w[:, columns]
                    matrix = _folded(p, matrix, scale[:, columns]) if folds(p) else matrix
                    y = _dot(x[rows, :].astype(p.compute), matrix.astype(p.compute), p)
                once = scale is not None and p.scales == 1
                scaled = (lambda y: y * scale[:, columns]) if once else (lambda y: y)
                if total is None:
                    return store(at, size, columns, start, scaled(y))
                where = pl.ds(at, size), columns

                @pl.when(step == 0)
                def _():
                    total[where] = y

                @pl.when(step > 0)
                def _():
                    row = at + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
                    total[where] += jnp.where(row >= start, y, 0)

                pl.when(step == last)(lambda: store(at, size, columns, start, scaled(total[where])))

            if width == b.n:
                part(slice(None))
            else:
                pl.loop(0, b.n // width)(lambda j: part(pl.ds(pl.multiple_of(j * width, width), width)))
            return carry

        return window

    @pl.when(belongs[visit] == 1)
    def _():
        begin = low - jax.lax.rem(low, p.align)
        large = jax.lax.div(high - begin + (b.rows - 1 if b.tail == b.rows else 0), b.rows)
        jax.lax.fori_loop(0, large, product(begin, b.rows), None)
        if b.tail < b.rows:
            begin = begin + large * b.rows
            jax.lax.fori_loop(0, jax.lax.div(high - begin + b.tail - 1, b.tail), product(begin, b.tail), None)

    @pl.when((belongs[visit] == 0) & (step == last))
    def _():
        begin = low - jax.lax.rem(low, p.align)

        def zero(i, carry):
            at = pl.multiple_of(begin + i * p.align, p.align)
            store(at, p.align, slice(None), at, jnp.zeros((p.align, b.n), jnp.float32))
            return carry

        jax.lax.fori_loop(0, jax.lax.div(high - begin + p.align - 1, p.align), zero, None)


def _by_part(p: Problem, b: Blocks, x, rows, w, columns, scale):
    """The sum over parts of K of (their product, times their scales)."""
    length = p.inner // p.scales

    def part(i):
        k = slice(i * length, (i + 1) * length)
        matrix = w[columns, k] if p.transpose else w[k, columns]
        return _dot(x[rows, k].astype(p.compute), matrix.astype(p.compute), p) * scale[i : i + 1, columns]

    return sum((part(i) for i in range(1, scales_of(p, b))), part(0))


def _folded(p: Problem, matrix, scale):
    """float32: the matrix times the scales of its parts."""
    length = p.inner // p.scales
    parts = []
    for i in range(scale.shape[0]):
        k = slice(i * length, (i + 1) * length)
        if p.transpose:
            parts.append(matrix[:, k].astype(jnp.float32) * scale[i, :][:, None])
        else:
            parts.append(matrix[k, :].astype(jnp.float32) * scale[i : i + 1])
    return jnp.concatenate(parts, axis=1 if p.transpose else 0)


def _dot(x, w, p: Problem):
    contract = (((1,), (1 if p.transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if p.compute == "float32" else None
    return jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
