"""SmoothQuant: outliers move from activations to weights (Xiao et al. 2022, arXiv:2211.10438).

s = max|x|^alpha / max|w|^(1 - alpha)        one a channel; x / s and s w are then about as hard to round
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

ALPHA = 0.5


def scales(largest: jax.Array, matrices: Sequence[jax.Array], alpha: float = ALPHA) -> jax.Array:
    """`[..., K]` from max |x| `[..., K]` and the matrices `[..., K, N]` that x meets."""
    rows = jnp.stack([jnp.max(jnp.abs(w.astype(jnp.float32)), axis=-1) for w in matrices]).max(0)
    known = (largest > 0) & (rows > 0)
    s = jnp.where(known, largest, 1) ** alpha / jnp.where(known, rows, 1) ** (1 - alpha)
    return jnp.where(known, jnp.clip(s, 1e-5, 1e5), 1)
