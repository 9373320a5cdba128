"""`quantized_matmul` in plain XLA."""

import jax
import jax.numpy as jnp


def quantized_matmul(x: jax.Array, w: jax.Array, scales: jax.Array | None = None) -> jax.Array:
    """`[..., K], [K, N], float32 [N] or None -> [..., N]` in the dtype of `x`."""
    precision = "highest" if x.dtype == jnp.float32 else None
    out = jnp.matmul(x, w.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    if scales is not None:
        out = out * scales
    return out.astype(x.dtype)
