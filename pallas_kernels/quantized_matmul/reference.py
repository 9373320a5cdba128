"""The definition of `quantized_matmul`.

    out[..., n] = (sum over k of x[..., k] * w[k, n]) * scales[n]        (w[n, k] with transpose)

in float32, rounded once to `out_dtype`. Weights-only quantisation per output channel is LLM.int8()'s weight
half (Dettmers et al. 2022, arXiv:2208.07339) without its outlier columns.
"""

import jax
import jax.numpy as jnp


def quantized_matmul(
    x: jax.Array, w: jax.Array, scales: jax.Array | None = None, *, transpose: bool, out_dtype: jnp.dtype
) -> jax.Array:
    """`[..., K], [K, N] or [N, K], float32 [N] or None -> [..., N]` in `out_dtype`."""
    w = w.astype(jnp.float32)
    out = jnp.matmul(x.astype(jnp.float32), w.T if transpose else w, precision="highest")
    if scales is not None:
        out = out * scales
    return out.astype(out_dtype)
