"""The numerics policy: float32 means float32."""

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """The `lax.Precision` of a product of two arrays of `dtype`.

    A TPU multiplies float32 in one bfloat16 pass unless told otherwise; `float32` here means
    `Precision.HIGHEST`. Narrower types need no more than the default.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


def dot(x: jax.Array, w: jax.Array, *, transpose: bool = False) -> jax.Array:
    """`x [..., K] @ w [K, N]` (or `w [N, K]` with `transpose`), accumulated in float32.

    Returns float32 `[..., N]`: the caller rounds once, to the dtype it wants.
    """
    contract = (((x.ndim - 1,), (1 if transpose else 0,)), ((), ()))
    dtype = jnp.promote_types(x.dtype, w.dtype)
    return lax.dot_general(
        x.astype(dtype),
        w.astype(dtype),
        contract,
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )
