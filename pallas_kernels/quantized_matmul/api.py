"""`quantized_matmul`: signature, validation and dispatch."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tuned
from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.quantized_matmul import blocks as sizes
from pallas_kernels.quantized_matmul import kernel, reference, xla
from pallas_kernels.quantized_matmul.blocks import Blocks, Problem
from pallas_kernels.stacks import check_layer, of_layer, of_stack
from pallas_kernels.vmem import narrow

_FLOATS = ("float32", "bfloat16", "float16")
_FEW = 256
_NARROW = ("int8", "int4", "int2", "float8_e4m3fn", "float8_e5m2")
_IN_KERNEL = ("int8", "int4", "float8_e4m3fn")
_CODES = {"uint8": 256, "uint4": 16}


@dataclass(frozen=True)
class _Static:
    transpose: bool
    activations: str | None
    out_dtype: Any
    blocks: Blocks | None
    implementation: Implementation | None


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array | None = None,
    codebook: jax.Array | None = None,
    *,
    layer: jax.typing.ArrayLike | None = None,
    transpose: bool = False,
    activations: Literal["int8"] | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply activations by a weight kept in its stored, possibly narrower, dtype.

    Products are summed in float32 (`precision=HIGHEST` for float32), and the result is rounded once, to
    `out_dtype`. Every product is exact, except that many rows of 16-bit activations meet a weight with several
    scales a column after it was rounded to their dtype. Differentiable in reverse mode in `x`, a `w` of 16 or 32
    bits, and `scales`.

    Args:
        x: float32, bfloat16 or float16 `[..., K]`, at least one axis.
        w: float32, bfloat16, float16, int8, int4, int2, float8_e4m3fn or float8_e5m2 `[K, N]`, or `[N, K]` with
            `transpose`; with a codebook uint4 or uint8. Those of 4 and 2 bits lie several in a byte.
        scales: float32 `[N]` or `[G, N]`, needed with a `w` of 8 bits or fewer and refused otherwise: output
            channel `n` of the weight is `w[:, n] * scales[n]`, or `w[k, n] * scales[k // (K / G), n]`; G divides K.
        codebook: float32 `[entries]`, at most 16 for uint4 and 256 for uint8: `codebook[w]` stands for `w`. Codes
            beyond it are unspecified.
        layer: int or int32 scalar, 0 to L - 1 (out of range under `jit`: the nearest). `w`, `scales` and the
            codebook then have an axis of L layers before the others; the kernel reads that layer where it lies, and
            none is cut out.
        transpose: multiply by the transpose of `w`, as checkpoints and tied heads store it. On a CPU this
            is the faster layout for a few rows and a 16- or 8-bit weight.
        activations: `"int8"` rounds each row of `x` to eight bits and its own scale, and multiplies bytes: twice
            the peak of a v5e, v5p or v6e. Needs an int8, int4 or int2 `w`. Gradients pass the rounding unchanged.
        out_dtype: a floating dtype; the dtype of `x` when None.
        blocks: sizes for the TPU kernel; chosen when None (`pallas_kernels.tuned`).
        implementation: `"reference"` (the definition), `"xla"` (fast on CPU and GPU), `"pallas"` (the TPU kernel),
            `"interpret"` (that kernel, interpreted). None takes the kernel for a TPU and a `w` of int8, int4 or
            float8_e4m3fn, but for few rows of float8 with a scale a column, and the XLA form elsewhere.

    Returns:
        `[..., N]` in `out_dtype`.

    Raises:
        InputError: shapes or dtypes do not fit together, or `blocks` do not fit them or VMEM.
        UnsupportedError: a dtype outside those above; the kernel asked for by name cannot serve the call.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    layer = check_layer("w", w, layer, 3)
    own, own_scales, own_codebook = (_of_one_layer(a, layer) for a in (w, scales, codebook))
    for name, beside in (("scales", scales), ("codebook", codebook)):
        if layer is not None and beside is not None and beside.shape[0] != w.shape[0]:
            raise InputError(f"{name}.shape={beside.shape} must start with the L={w.shape[0]} layers of w.")
    _validate(x, own, own_scales, own_codebook, transpose, activations, out_dtype, implementation)
    if implementation == "reference":
        w, scales, codebook = (of_layer(a, layer) for a in (w, scales, codebook))
        return reference.quantized_matmul(
            x, w, scales, codebook, transpose=transpose, activations=activations, out_dtype=out_dtype
        )
    rows = x.size // max(1, x.shape[-1])
    if implementation is None and _better_as_a_dot(rows, own, own_scales):
        implementation = "xla"
    static = _Static(transpose, activations, out_dtype, blocks, implementation)
    lead = () if layer is None else w.shape[:1]
    by_group = None if scales is None else scales.reshape(*lead, -1, scales.shape[-1])
    out = _jitted(x.reshape(-1, x.shape[-1]), w, by_group, codebook, layer, static)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _of_one_layer(stacked: Any, layer: Any) -> Any:
    """The shape and dtype of one layer's part."""
    if layer is None or stacked is None:
        return stacked
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _matmul(x, w, scales, codebook, layer, static: _Static):
    x, x_scale = reference.quantize_rows(x) if static.activations else (x, None)
    own, own_scales = _of_one_layer(w, layer), _of_one_layer(scales, layer)
    problem = Problem(
        rows=x.shape[0],
        inner=x.shape[1],
        columns=own.shape[0 if static.transpose else 1],
        x=x.dtype.name,
        w=w.dtype.name,
        out=static.out_dtype.name,
        groups=0 if own_scales is None else own_scales.shape[0],
        transpose=static.transpose,
    )
    return dispatch(
        "quantized_matmul",
        static.implementation,
        x,
        x_scale,
        w,
        scales,
        codebook,
        layer,
        reference=_xla(static),
        xla=_xla(static),
        pallas=partial(_pallas, problem=problem, static=static),
        unsupported=_unsupported(problem, codebook, static),
    )


def _matmul_fwd(x, w, scales, codebook, layer, static):
    return _matmul(x, w, scales, codebook, layer, static), (x, w, scales, codebook, layer)


def _matmul_bwd(static, saved, dout):
    x, w, scales, codebook, layer = saved
    rounded, x_scale = reference.quantize_rows(x) if static.activations else (x, None)
    own, own_scales, own_codebook = (of_layer(a, layer) for a in (w, scales, codebook))
    given, dout = (rounded, x_scale, own, own_scales, own_codebook), dout.astype(jnp.float32)
    dx, dw, dscales = xla.backward(*given, dout, dtype=x.dtype, transpose=static.transpose)
    if dw is None and jnp.issubdtype(w.dtype, jnp.floating):
        dw = jnp.zeros_like(own)
    # The codebook is data to a product, as the codes are.
    none = None if codebook is None else jnp.zeros_like(codebook)
    return dx, of_stack(dw, w, layer), of_stack(dscales, scales, layer), none, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
# Jitted, so that the layers of a model share one trace.
_jitted = jax.jit(_matmul, static_argnums=5)


def _better_as_a_dot(rows: int, w, scales) -> bool:
    """Whether XLA does as well for a TPU: a plain dot is fused with its neighbours, which no kernel is.

    Few rows of float8 are bound by the widening of the weight, which XLA does in fewer instructions.
    """
    if w.dtype.name not in _IN_KERNEL:
        return True
    return w.dtype == jnp.float8_e4m3fn and scales.ndim == 1 and rows <= _FEW


def _xla(static: _Static):
    def form(x, x_scale, w, scales, codebook, layer):
        w, scales, codebook = (of_layer(a, layer) for a in (w, scales, codebook))
        return xla.quantized_matmul(x, x_scale, w, scales, codebook, transpose=static.transpose).astype(
            static.out_dtype
        )

    return form


def _pallas(x, x_scale, w, scales, codebook, layer, *, problem: Problem, static: _Static, interpret: bool):
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((problem.rows, problem.columns), static.out_dtype)
    if static.blocks is not None and (reasons := sizes.refusals(problem, static.blocks)):
        raise InputError(f"blocks={static.blocks} do not divide the operands: {'; '.join(reasons)}.")
    chosen = tuned.choose("quantized_matmul", sizes, problem, chips.current(), static.blocks)
    return kernel.pallas(
        x,
        x_scale,
        w,
        scales,
        layer,
        problem=problem,
        blocks=chosen,
        out_dtype=static.out_dtype,
        interpret=interpret,
    )


def _unsupported(problem: Problem, codebook, static: _Static) -> list[str]:
    named = (("x", problem.x), ("w", problem.w), ("out_dtype", problem.out))
    reasons = [f"{name} is float16, which TPUs do not compute with" for name, dtype in named if dtype == "float16"]
    if codebook is not None:
        reasons.append("a codebook, which only the XLA form looks up")
    elif narrow(problem.w) and problem.w not in _IN_KERNEL:
        reasons.append(f"w is {problem.w}, which only the XLA form widens")
    if not reasons and static.blocks is None and (shortage := sizes.shortage(problem, chips.current())):
        reasons.append(shortage)
    return reasons


def _validate(x, w, scales, codebook, transpose, activations, out_dtype, implementation) -> None:
    check_implementation(implementation)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1 if transpose else 0]:
        raise InputError(
            f"x.shape={x.shape} and w.shape={w.shape} must be [..., K] and {'[N, K]' if transpose else '[K, N]'} "
            f"with {transpose=}."
        )
    for name, dtype in (("x", x.dtype), ("out", out_dtype)):
        if dtype.name not in _FLOATS:
            raise UnsupportedError(f"{name}_dtype={dtype} is not served: use one of {', '.join(_FLOATS)}.")
    if w.dtype.name not in (*_FLOATS, *_NARROW, *_CODES):
        raise UnsupportedError(
            f"w.dtype={w.dtype} is not served: use one of {', '.join(_FLOATS)}, or of {', '.join(_NARROW)} with "
            f"scales, or of {', '.join(_CODES)} with scales and a codebook."
        )
    if (w.dtype.name in (*_NARROW, *_CODES)) != (scales is not None):
        raise InputError(
            f"w.dtype={w.dtype} with scales {'missing' if scales is None else 'given'}: "
            f"{', '.join((*_NARROW, *_CODES))} need scales and other dtypes take none."
        )
    if (w.dtype.name in _CODES) != (codebook is not None):
        raise InputError(
            f"w.dtype={w.dtype} with a codebook {'missing' if codebook is None else 'given'}: {', '.join(_CODES)} "
            "need a codebook and other dtypes take none."
        )
    if codebook is not None and (
        codebook.ndim != 1 or codebook.dtype != jnp.float32 or not 0 < codebook.shape[0] <= _CODES[w.dtype.name]
    ):
        raise InputError(
            f"codebook={codebook.dtype}{list(codebook.shape)} must be float32 [entries] with 1 to "
            f"{_CODES[w.dtype.name]} entries for codes of {w.dtype}."
        )
    if activations not in (None, "int8"):
        raise InputError(f"{activations=} is unknown: choose 'int8', or None to keep x as it is.")
    if activations and w.dtype.name not in ("int8", "int4", "int2"):
        raise InputError(
            f"{activations=} with w.dtype={w.dtype}: bytes multiply an int8, int4 or int2 weight only."
        )
    columns = w.shape[0 if transpose else 1]
    if scales is None:
        return
    if scales.ndim not in (1, 2) or scales.shape[-1] != columns or scales.dtype != jnp.float32:
        raise InputError(
            f"scales={scales.dtype}{list(scales.shape)} must be float32 [{columns}] or [groups, {columns}]."
        )
    if scales.ndim == 2 and (scales.shape[0] == 0 or x.shape[-1] % scales.shape[0]):
        raise InputError(
            f"scales.shape={scales.shape} has {scales.shape[0]} groups, which must divide K={x.shape[-1]}."
        )
