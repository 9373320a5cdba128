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
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply activations by a weight kept in its stored, possibly narrower, dtype.

    Every product is taken and summed in float32 or, when `x` and `w` share a 16-bit dtype, by a dot of that
    dtype that sums in float32; float32 `x` uses `precision=HIGHEST`. Differentiable in `x`, a floating `w`,
    and `scales`.

    Args:
        x: float32, bfloat16 or float16 `[..., K]`, at least one axis.
        w: float32, bfloat16, float16 or int8 `[K, N]`.
        scales: float32 `[N]`, needed with int8 `w` and refused otherwise: column `n` of the weight is
            `w[:, n] * scales[n]`.
        implementation: `"reference"` (the definition), `"xla"` (fast on CPU and GPU), or None to choose.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        InputError: shapes or dtypes do not fit together.
        UnsupportedError: a dtype outside those above.
    """
    _validate(x, w, scales, implementation)
    if implementation == "reference":
        return reference.quantized_matmul(x, w, scales)
    return xla.quantized_matmul(x, w, scales)


def _validate(x, w, scales, implementation) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        raise InputError(
            f"{implementation=} is unknown: choose one of {', '.join(get_args(Implementation))}, or None."
        )
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise InputError(f"x.shape={x.shape} and w.shape={w.shape} must be [..., K] and [K, N].")
    if x.dtype.name not in _FLOATS:
        raise UnsupportedError(f"x.dtype={x.dtype} is not served: cast it to one of {', '.join(_FLOATS)}.")
    if w.dtype.name not in (*_FLOATS, "int8"):
        raise UnsupportedError(
            f"w.dtype={w.dtype} is not served: use one of {', '.join(_FLOATS)}, or int8 with scales."
        )
    if (w.dtype == jnp.int8) != (scales is not None):
        raise InputError(
            f"w.dtype={w.dtype} with scales {'missing' if scales is None else 'given'}: int8 needs "
            "scales and other dtypes take none."
        )
    if scales is not None and (scales.shape != w.shape[1:] or scales.dtype != jnp.float32):
        raise InputError(f"scales={scales.dtype}{list(scales.shape)} must be float32 [{w.shape[1]}].")
