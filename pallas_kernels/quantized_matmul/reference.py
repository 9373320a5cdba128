"""The definition of `quantized_matmul`.

    out[..., n] = (sum over k of x[..., k] * w[k, n]) * scales[n]

in float32, rounded once to the dtype of `x`. Weights-only quantisation per output channel is LLM.int8()'s
weight half (Dettmers et al. 2022, arXiv:2208.07339) without its outlier columns.
"""

import jax
import jax.numpy as jnp


def quantized_matmul(x: jax.Array, w: jax.Array, scales: jax.Array | None = None) -> jax.Array:
    """`[..., K], [K, N], float32 [N] or None -> [..., N]` in the dtype of `x`."""
    out = jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    if scales is not None:
        out = out * scales
    return out.astype(x.dtype)
