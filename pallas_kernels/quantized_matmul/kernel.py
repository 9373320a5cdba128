"""`quantized_matmul` as a TPU kernel: the weight travels and is multiplied as it is stored, scales come last."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import current
from pallas_kernels.quantized_matmul.blocks import Blocks, Problem, columns_outside, vmem_bytes, widens
from pallas_kernels.stacks import in_hbm
from pallas_kernels.vmem import limit


def pallas(
    x: jax.Array,
    x_scale: jax.Array | None,
    w: jax.Array,
    scales: jax.Array | None,
    layer: jax.Array | None,
    *,
    problem: Problem,
    blocks: Blocks,
    out_dtype,
    interpret: bool,
) -> jax.Array:
    """`[M, K]`, float32 `[M, 1]` with int8 x, `[K, N]` or `[N, K]`, float32 `[groups, N]` or None -> `[M, N]`.

    With `layer`, int32, the weight and its scales have an axis of layers before these.
    """
    p, b = problem, blocks
    if layer is None:
        layer, w, scales = jnp.int32(0), w[None], None if scales is None else scales[None]
    else:
        w = in_hbm(w, interpret)
        scales = None if scales is None else in_hbm(scales, interpret)
    steps_m, steps_n, steps_k = pl.cdiv(p.rows, b.m), pl.cdiv(p.columns, b.n), p.inner // b.k
    # The inner of the two outer loops is the one whose operand is read again.
    by_columns = columns_outside(p, b)

    def at(index, stacked=False):
        def of(first, second, l, layer):
            i, j = (second, first) if by_columns else (first, second)
            return (layer[0], *index(i, j, l)) if stacked else index(i, j, l)

        return of

    grid = (steps_n, steps_m, steps_k) if by_columns else (steps_m, steps_n, steps_k)
    w_block, w_index = ((b.n, b.k), lambda i, j, l: (j, l)) if p.transpose else ((b.k, b.n), lambda i, j, l: (l, j))
    operands = [
        (x, pl.BlockSpec((b.m, b.k), at(lambda i, j, l: (i, l)))),
        (w, pl.BlockSpec((None, *w_block), at(w_index, stacked=True))),
    ]
    if x_scale is not None:
        operands.append((x_scale, pl.BlockSpec((b.m, 1), at(lambda i, j, l: (i, 0)))))
    if scales is not None:
        share = max(1, p.groups * b.k // p.inner)
        by_group = p.groups > 1
        scales_at = at(lambda i, j, l: (l if by_group else 0, j), stacked=True)
        operands.append((scales, pl.BlockSpec((None, share, b.n), scales_at)))
    wide = widens(p, b)
    scratch = []
    if steps_k > 1:
        exact = p.compute == "int8" and p.groups < 2
        scratch.append(pltpu.VMEM((b.m, b.n), jnp.int32 if exact else jnp.float32))
    if wide:
        scratch.append(pltpu.VMEM(w_block, jnp.dtype(p.compute)))
    # A widened weight is kept from one tile of rows to the next, so those stay on one core.
    keeps = wide and by_columns and steps_k == 1
    return pl.pallas_call(
        partial(_body, problem=p, blocks=b, rows_axis=1 if by_columns else 0, keeps=keeps),
        out_shape=jax.ShapeDtypeStruct((p.rows, p.columns), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec for _, spec in operands],
            out_specs=pl.BlockSpec((b.m, b.n), at(lambda i, j, l: (i, j))),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if keeps else "parallel", "arbitrary"),
            vmem_limit_bytes=limit(current(), vmem_bytes(p, b)),
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *(operand for operand, _ in operands))


def _body(_, *operands, problem: Problem, blocks: Blocks, rows_axis: int, keeps: bool):
    p, b = problem, blocks
    refs: list[Any] = list(operands)
    x, w = refs.pop(0), refs.pop(0)
    x_scale: Any = refs.pop(0) if p.x == "int8" else None
    scales: Any = refs.pop(0) if p.groups else None
    out = refs.pop(0)
    total: Any = refs.pop(0) if b.k < p.inner else None
    wide: Any = refs.pop(0) if refs else None
    step, last = pl.program_id(2), p.inner // b.k - 1

    if wide is not None:
        if keeps:
            pl.when(pl.program_id(rows_axis) == 0)(lambda: _widen(p, w, scales, wide))
        else:
            _widen(p, w, scales, wide)

    def window(i, carry=None):
        rows = pl.ds(pl.multiple_of(i * b.rows, b.rows), b.rows) if b.rows < b.m else slice(None)
        if wide is not None:
            part = _dot(x[rows, :].astype(wide.dtype), wide[...], p)
        elif p.groups > 1:
            part = _by_group(p, b, x[rows, :], w, scales)
        else:
            part = _dot(x[rows, :].astype(p.compute), w[...].astype(p.compute), p)

        def finish(y):
            y = y.astype(jnp.float32)
            if x_scale is not None:
                y = y * x_scale[rows, :]
            if p.groups == 1:
                y = y * scales[...]
            out[rows, :] = y.astype(out.dtype)

        if total is None:
            finish(part)
            return carry

        @pl.when(step == 0)
        def _():
            total[rows, :] = part

        @pl.when((step > 0) & (step < last))
        def _():
            total[rows, :] += part

        pl.when(step == last)(lambda: finish(total[rows, :] + part))
        return carry

    if b.rows < b.m:
        jax.lax.fori_loop(0, b.m // b.rows, window, None)
    else:
        window(0)


def _dot(x, w, p: Problem):
    contract = (((1,), (1 if p.transpose else 0,)), ((), ()))
    whole = p.compute == "int8"
    precision = jax.lax.Precision.HIGHEST if p.compute == "float32" else None
    kind = jnp.int32 if whole else jnp.float32
    return jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=kind)


def _by_group(p: Problem, b: Blocks, x, w, scales):
    """The sum over groups of (their product, times their scales)."""
    sums = jnp.zeros((x.shape[0], b.n), jnp.float32)
    for g in range(b.k // p.group):
        k = slice(g * p.group, (g + 1) * p.group)
        part = w[:, k] if p.transpose else w[k, :]
        sums = (
            sums
            + _dot(x[:, k].astype(p.compute), part.astype(p.compute), p).astype(jnp.float32) * scales[g : g + 1]
        )
    return sums


def _widen(p: Problem, w, scales, wide):
    """Writes the weight in the dtype of the products, times its scales where there are several a column."""
    if p.groups < 2:
        wide[...] = w[...].astype(wide.dtype)
        return
    for g in range(scales.shape[0]):
        k = slice(g * p.group, (g + 1) * p.group)
        if p.transpose:
            part = w[:, k].astype(jnp.float32) * scales[g, :][:, None]
            wide[:, k] = part.astype(wide.dtype)
        else:
            wide[k, :] = (w[k, :].astype(jnp.float32) * scales[g : g + 1]).astype(wide.dtype)
