"""SmoothQuant: outliers move from activations to weights (Xiao et al. 2022, arXiv:2211.10438).

s = max|x|^alpha / max|w|^(1 - alpha)        one a channel; x / s and s w are then about as hard to round
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

ALPHA = 0.5


def scales(largest: jax.Array, rows: jax.Array, alpha: float = ALPHA) -> jax.Array:
    """`[..., K]` from max |x| of each channel and max |w| of its row in the matrices that x meets."""
    known = (largest > 0) & (rows > 0)
    s = jnp.where(known, largest, 1) ** alpha / jnp.where(known, rows, 1) ** (1 - alpha)
    return jnp.where(known, jnp.clip(s, 1e-5, 1e5), 1)
