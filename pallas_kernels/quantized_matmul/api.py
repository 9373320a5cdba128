"""`quantized_matmul`: signature, validation and dispatch."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.quantized_matmul import reference, xla

Implementation = Literal["reference", "xla"]

_FLOATS = ("float32", "bfloat16", "float16")


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array | None = None,
    *,
    transpose: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply activations by a weight kept in its stored, possibly narrower, dtype.

    Every product is exact and summed in float32 (`precision=HIGHEST` for float32), and the result is rounded
    once, to `out_dtype`. Differentiable in reverse mode in `x`, a floating `w`, and `scales`.

    Args:
        x: float32, bfloat16 or float16 `[..., K]`, at least one axis.
        w: float32, bfloat16, float16 or int8 `[K, N]`, or `[N, K]` with `transpose`.
        scales: float32 `[N]`, needed with int8 `w` and refused otherwise: output channel `n` of the weight is
            `w[:, n] * scales[n]`.
        transpose: multiply by the transpose of `w`, as checkpoints and tied heads store it. On a CPU this
            is the faster layout for a few rows and a 16- or 8-bit weight.
        out_dtype: a floating dtype; the dtype of `x` when None.
        implementation: `"reference"` (the definition), `"xla"` (fast on CPU and GPU), or None to choose.

    Returns:
        `[..., N]` in `out_dtype`.

    Raises:
        InputError: shapes or dtypes do not fit together.
        UnsupportedError: a dtype outside those above.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    _validate(x, w, scales, transpose, out_dtype, implementation)
    if implementation == "reference":
        return reference.quantized_matmul(x, w, scales, transpose=transpose, out_dtype=out_dtype)
    return xla.quantized_matmul(x, w, scales, transpose=transpose, out_dtype=out_dtype)


def _validate(x, w, scales, transpose, out_dtype, implementation) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        raise InputError(
            f"{implementation=} is unknown: choose one of {', '.join(get_args(Implementation))}, or None."
        )
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1 if transpose else 0]:
        raise InputError(
            f"x.shape={x.shape} and w.shape={w.shape} must be [..., K] and {'[N, K]' if transpose else '[K, N]'} "
            f"with {transpose=}."
        )
    for name, dtype in (("x", x.dtype), ("out", out_dtype)):
        if dtype.name not in _FLOATS:
            raise UnsupportedError(f"{name}_dtype={dtype} is not served: use one of {', '.join(_FLOATS)}.")
    if w.dtype.name not in (*_FLOATS, "int8"):
        raise UnsupportedError(
            f"w.dtype={w.dtype} is not served: use one of {', '.join(_FLOATS)}, or int8 with scales."
        )
    if (w.dtype == jnp.int8) != (scales is not None):
        raise InputError(
            f"w.dtype={w.dtype} with scales {'missing' if scales is None else 'given'}: int8 needs "
            "scales and other dtypes take none."
        )
    columns = w.shape[0 if transpose else 1]
    if scales is not None and (scales.shape != (columns,) or scales.dtype != jnp.float32):
        raise InputError(f"scales={scales.dtype}{list(scales.shape)} must be float32 [{columns}].")
