"""`flash_attention` by its definition."""

import jax

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.masks import Rules


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    rules: Rules,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), every score written out.

    For row b, head n (key head n // (N / K): Ainslie et al. 2023, arXiv:2305.13245), query t, visible keys s:

        x[s] = scale * q[b, n, t] . k[b, n // (N / K), s]
        y[s] = softcap * tanh(x[s] / softcap)            with a softcap (Gemma 2, arXiv:2408.00118), else x[s]
        z[s] = y[s] + alibi_slopes[n] * (pos(s) - pos(t))              (Press et al. 2022, arXiv:2108.12409)
        lse  = log(exp(sinks[n]) + sum_s exp(z[s]))                    (sinks: GPT-OSS, arXiv:2508.10925)
        out  = sum_s exp(z[s] - lse) v[s]

    With no visible key, out is 0 and lse is sinks[n], or -inf without sinks.
    Returns out in q's dtype and lse in float32.
    """
    out, lse = dense_attention(q, k, v, rules, scale=scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes)
    return out.astype(q.dtype), lse
