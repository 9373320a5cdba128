"""`grouped_matmul`: signature, validation and dispatch."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import sequential_vmap

from pallas_kernels import chips, tuned
from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.grouped_matmul import blocks as sizes
from pallas_kernels.grouped_matmul import kernel, reference, xla
from pallas_kernels.grouped_matmul.blocks import Blocks, Problem
from pallas_kernels.stacks import check_layer, of_layer, of_stack

_FLOATS = ("float32", "bfloat16", "float16")
_NARROW = ("int8", "int4")


@dataclass(frozen=True)
class _Static:
    transpose: bool
    blocks: Blocks | None
    implementation: Implementation | None


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    rhs_scale: jax.Array | None = None,
    layer: int | jax.Array | None = None,
    transpose: bool = False,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply each row of `lhs` by the matrix of its group.

    The rows of `lhs` are sorted by group: the first `group_sizes[0]` rows belong to group 0, and so on.
    Rows beyond `sum(group_sizes)` belong to none and give 0, whatever they hold; groups may be empty, and
    the matrix of an empty group is not used. Sums run in float32 (`precision=HIGHEST` for float32 `lhs`).
    Differentiable in reverse mode in `lhs`, a floating `rhs`, and `rhs_scale`.

    Args:
        lhs: float32, bfloat16 or float16 `[M, K]`.
        rhs: float32, bfloat16, float16, int8 or int4 `[G, K, N]`, or `[G, N, K]` with `transpose`; stacked
            `[L, G, K, N]` with `layer`, of which the kernel reads that layer's matrices where they lie.
        group_sizes: int32 `[G]`, rows in each group, none negative. A sum above `M` is refused outside
            `jit`; under `jit` the groups are cut off at row `M`.
        rhs_scale: float32 `[G, N]` or `[G, S, N]`, needed with int8 and int4 `rhs` and refused otherwise: column
            `n` of group `g` stands for `rhs[g, :, n] * rhs_scale[g, n]`, or has a scale for each of S equal parts
            of K. With `layer` an axis of L before these.
        layer: which of the stacked matrices, 0..L-1; may be traced (out of range then means the nearest one).
        transpose: multiply by the transposes of the matrices. On a CPU this is the faster layout for a few
            rows a group and 16- or 8-bit matrices.
        blocks: sizes for the TPU kernel; chosen when None (`pallas_kernels.tuned`).
        implementation: `"reference"` (the definition), `"xla"` (fast on CPU and GPU), `"pallas"` (the TPU kernel),
            `"interpret"` (that kernel, interpreted). None takes the kernel for a TPU and the XLA form elsewhere.

    Returns:
        `[M, N]` in the dtype of `lhs`.

    Raises:
        InputError: shapes or dtypes do not fit together, `group_sizes` do not fit `M`, or `blocks` do not fit the
            operands or VMEM.
        UnsupportedError: a dtype outside those above; the kernel asked for by name cannot serve the call.
    """
    layer = check_layer("rhs", rhs, layer, 4)
    whole = rhs if layer is None else jax.ShapeDtypeStruct(rhs.shape[1:], rhs.dtype)
    scales = rhs_scale
    if layer is not None and rhs_scale is not None:
        if rhs_scale.ndim not in (3, 4) or rhs_scale.shape[0] != rhs.shape[0]:
            raise InputError(
                f"rhs_scale.shape={rhs_scale.shape} must be [L, G, N] or [L, G, S, N] with L={rhs.shape[0]}."
            )
        scales = jax.ShapeDtypeStruct(rhs_scale.shape[1:], rhs_scale.dtype)
    _validate(lhs, whole, group_sizes, scales, transpose, implementation)
    if implementation == "reference":
        rhs, rhs_scale = of_layer(rhs, layer), of_layer(rhs_scale, layer)
        return reference.grouped_matmul(lhs, rhs, group_sizes, rhs_scale, transpose=transpose)
    return _jitted(lhs, rhs, group_sizes, rhs_scale, layer, _Static(transpose, blocks, implementation))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _grouped(lhs, rhs, group_sizes, rhs_scale, layer, static: _Static):
    def form(lhs, rhs, group_sizes, rhs_scale, layer):
        scale = of_layer(rhs_scale, layer)
        return xla.grouped_matmul(lhs, rhs, group_sizes, scale, transpose=static.transpose, layer=layer)

    return dispatch(
        "grouped_matmul",
        static.implementation,
        lhs,
        rhs,
        group_sizes,
        rhs_scale,
        layer,
        reference=form,
        xla=form,
        pallas=partial(_pallas, static=static),
        unsupported=_unsupported(_problem(lhs, rhs, rhs_scale, layer, static), static),
    )


def _grouped_fwd(lhs, rhs, group_sizes, rhs_scale, layer, static):
    return _grouped(lhs, rhs, group_sizes, rhs_scale, layer, static), (lhs, rhs, group_sizes, rhs_scale, layer)


def _grouped_bwd(static, saved, dout):
    lhs, rhs, group_sizes, rhs_scale, layer = saved
    own = of_layer(rhs, layer), group_sizes, of_layer(rhs_scale, layer)
    dlhs, drhs, dscale = xla.backward(lhs, *own, dout, transpose=static.transpose)

    return dlhs, of_stack(drhs, rhs, layer), None, of_stack(dscale, rhs_scale, layer), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
# Jitted, so that the layers of a model share one trace.
_jitted = jax.jit(_grouped, static_argnums=5)


def _problem(lhs, rhs, rhs_scale, layer, static: _Static) -> Problem:
    several = rhs_scale is not None and rhs_scale.ndim - (layer is not None) == 3
    return Problem(
        rows=lhs.shape[0],
        inner=lhs.shape[1],
        columns=rhs.shape[-2 if static.transpose else -1],
        groups=rhs.shape[-3],
        lhs=lhs.dtype.name,
        rhs=rhs.dtype.name,
        transpose=static.transpose,
        scales=1 if rhs_scale is None or not several else rhs_scale.shape[-2],
    )


def _pallas(lhs, rhs, group_sizes, rhs_scale, layer, *, static: _Static, interpret: bool):
    problem = _problem(lhs, rhs, rhs_scale, layer, static)
    if 0 in (*lhs.shape, *rhs.shape):
        return jnp.zeros((problem.rows, problem.columns), lhs.dtype)
    if static.blocks is not None and (reasons := sizes.refusals(problem, static.blocks)):
        raise InputError(f"blocks={static.blocks} do not divide the operands: {'; '.join(reasons)}.")
    chosen = tuned.choose("grouped_matmul", sizes, problem, chips.current(), static.blocks)
    run = partial(kernel.pallas, problem=problem, blocks=chosen, interpret=interpret)
    # The length of the grid is data, which a batch of calls cannot share.
    return sequential_vmap(run)(lhs, rhs, group_sizes, rhs_scale, layer)


def _unsupported(problem: Problem, static: _Static) -> list[str]:
    named = (("lhs", problem.lhs), ("rhs", problem.rhs))
    reasons = [f"{name} is float16, which TPUs do not compute with" for name, dtype in named if dtype == "float16"]
    if not reasons and static.blocks is None and (shortage := sizes.shortage(problem, chips.current())):
        reasons.append(shortage)
    return reasons


def _validate(lhs, rhs, group_sizes, rhs_scale, transpose, implementation) -> None:
    check_implementation(implementation)
    letters = "[G, N, K]" if transpose else "[G, K, N]"
    if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
        raise InputError(
            f"lhs.shape={lhs.shape}, rhs.shape={rhs.shape}, group_sizes.shape={group_sizes.shape} must be "
            f"[M, K], {letters} and [G] with {transpose=}."
        )
    if lhs.shape[1] != rhs.shape[2 if transpose else 1]:
        raise InputError(
            f"lhs.shape={lhs.shape} and rhs.shape={rhs.shape} must agree in K: they are [M, K] and {letters} "
            f"with {transpose=}."
        )
    if rhs.shape[0] == 0:
        raise InputError(f"rhs.shape={rhs.shape} must have at least one group.")
    if group_sizes.shape[0] != rhs.shape[0]:
        raise InputError(
            f"group_sizes.shape={group_sizes.shape} must be ({rhs.shape[0]},), one entry a matrix of "
            f"rhs.shape={rhs.shape}."
        )
    if group_sizes.dtype != jnp.int32:
        raise InputError(f"group_sizes.dtype={group_sizes.dtype} must be int32: cast it.")
    if lhs.dtype.name not in _FLOATS:
        raise UnsupportedError(f"lhs.dtype={lhs.dtype} is not served: cast it to one of {', '.join(_FLOATS)}.")
    if rhs.dtype.name not in (*_FLOATS, *_NARROW):
        raise UnsupportedError(
            f"rhs.dtype={rhs.dtype} is not served: use one of {', '.join(_FLOATS)}, or int8 or int4 with rhs_scale."
        )
    if (rhs.dtype.name in _NARROW) != (rhs_scale is not None):
        raise InputError(
            f"rhs.dtype={rhs.dtype} with rhs_scale {'missing' if rhs_scale is None else 'given'}: int8 and int4 "
            "need rhs_scale and other dtypes take none."
        )
    if rhs_scale is not None:
        groups, columns = rhs.shape[0], rhs.shape[1 if transpose else 2]
        parts = rhs_scale.shape[1:-1]
        fits = rhs_scale.ndim in (2, 3) and (rhs_scale.shape[0], rhs_scale.shape[-1]) == (groups, columns)
        if not fits or rhs_scale.dtype != jnp.float32 or (parts and (not parts[0] or lhs.shape[1] % parts[0])):
            raise InputError(
                f"rhs_scale={rhs_scale.dtype}{list(rhs_scale.shape)} must be float32 [{groups}, {columns}] or "
                f"[{groups}, S, {columns}] with an S that divides K={lhs.shape[1]}."
            )
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any() or sizes.sum() > lhs.shape[0]:
            raise InputError(
                f"group_sizes with least {sizes.min(initial=0)} and sum {sizes.sum()} must not be "
                f"negative nor sum to more than M={lhs.shape[0]}."
            )
