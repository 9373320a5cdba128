"""AWQ: channels of large inputs are scaled up before rounding (Lin et al. 2023, arXiv:2306.00978).

What a group of rows loses by rounding depends on its largest entry, so a channel that is scaled up by s loses 1/s
of what it did as long as that entry stays. s = (mean |x|)^alpha, one a channel, is searched over alpha; the model
takes 1/s into what comes before (`jaxinf.compression.folding`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

ALPHAS: np.ndarray = np.linspace(0, 1, 21, dtype=np.float32)


def candidates(mean: jax.Array) -> jax.Array:
    """Scales `[alphas, ..., K]` from mean |x| `[..., K]`, about 1; channels without inputs get 1."""
    floor = 1e-4 * jnp.max(mean, axis=-1, keepdims=True)
    size = jnp.where(mean > 0, jnp.maximum(mean, floor), 1)
    logs = jnp.log(size)
    middle = (jnp.max(logs, -1, keepdims=True) + jnp.min(logs, -1, keepdims=True)) / 2
    alphas = jnp.asarray(ALPHAS).reshape(-1, *[1] * mean.ndim)
    return jnp.exp(alphas * jnp.where(mean > 0, logs - middle, 0))
