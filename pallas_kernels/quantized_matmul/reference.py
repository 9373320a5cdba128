"""The definition of `quantized_matmul`.

    out[..., n] = sum over k of x[..., k] * w[k, n] * scales[k // (K / G), n]      (w[n, k] with transpose)

in float32, rounded once to `out_dtype`; `scales [N]` is one group (G = 1). With a codebook, `codebook[w[k, n]]`
stands for `w[k, n]`. With `activations="int8"`, `x` is first rounded to what eight bits of its own row can hold:

    x_scale[...] = max over k of |x[..., k]| / 127                                 (1 for a row of zeros)
    x[..., k]    = x_scale[...] * round(x[..., k] / x_scale[...])

Weights-only quantisation per output channel is LLM.int8()'s weight half (Dettmers et al. 2022, arXiv:2208.07339)
without its outlier columns; scales by row for activations are that paper's too. Groups along the contraction are
those of GPTQ and AWQ (Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978). Codebooks are
those of Deep Compression (Han et al. 2015, arXiv:1510.00149), and NF4's and MXFP4's fixed ones.
"""

import jax
import jax.numpy as jnp


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[..., K]` -> int8 `[..., K]` and float32 `[..., 1]`, whose product is `x` rounded."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) * (1 / 127)
    scale = jnp.where(scale == 0, 1, scale)
    return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array | None = None,
    codebook: jax.Array | None = None,
    *,
    transpose: bool,
    activations: str | None = None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """`[..., K], [K, N] or [N, K], float32 [N] or [G, N] or None, float32 [entries] or None -> [..., N]` in
    `out_dtype`.

    Rounded activations are differentiated as if they were not rounded.
    """
    w = w.astype(jnp.float32) if codebook is None else codebook[w.astype(jnp.int32)]
    w = w.T if transpose else w
    x = x.astype(jnp.float32)
    if activations == "int8":
        rounded, x_scale = quantize_rows(x)
        x = x + jax.lax.stop_gradient(rounded.astype(jnp.float32) * x_scale - x)
    if scales is not None and scales.ndim == 2:
        w = w * jnp.repeat(scales, w.shape[0] // scales.shape[0], axis=0)
    out = jnp.matmul(x, w, precision="highest")
    if scales is not None and scales.ndim == 1:
        out = out * scales
    return out.astype(out_dtype)
