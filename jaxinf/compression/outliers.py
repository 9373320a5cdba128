"""LLM.int8(): channels with outliers stay wide, all others are bytes (Dettmers et al. 2022, arXiv:2208.07339).

There the channels are found anew in every pass. Here they are those of the calibration text, so that shapes are
static and the matrix needs no second copy.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.compression.observing import Stats
from jaxinf.quant import Format, QTensor

THRESHOLD = 6.0
"""Of an outlier: its largest |x| over the root mean square of an ordinary channel. (There: of |x| itself, which is
about that for inputs behind a norm.)"""


def prominence(stats: Stats) -> jax.Array:
    """`[..., K]`: a channel's largest |x|, over the root mean square of the median channel."""
    typical = jnp.sqrt(jnp.median(stats.squares, axis=-1) / jnp.maximum(stats.count, 1))
    return stats.largest / jnp.maximum(typical, 1e-30)[..., None]


def count(stats: Stats, threshold: float = THRESHOLD) -> int:
    """Channels beyond the threshold, of the matrix that has most."""
    return int(np.max(np.sum(np.asarray(prominence(stats)) >= threshold, axis=-1)))


def encode(w: jax.Array, stats: Stats, format: Format, group: int, wide: int, threshold: float | None) -> QTensor:
    """`[..., K, N]` with `wide` rows kept in its dtype: the most prominent, those below the threshold left out."""
    prominent, rows = jax.lax.top_k(prominence(stats), wide)
    if threshold is not None:
        rows = jnp.where(prominent >= threshold, rows, -1)
    return keep_rows(w, rows.astype(jnp.int32), format, group)


def keep_rows(w: jax.Array, rows: jax.Array, format: Format, group: int) -> QTensor:
    """`[..., K, N]` with rows int32 `[..., M]` kept in its dtype; -1: none."""
    lead = w.shape[:-2]
    rows = jnp.broadcast_to(rows, (*lead, rows.shape[-1]))
    flat, at = w.reshape(-1, *w.shape[-2:]), rows.reshape(-1, rows.shape[-1])

    def one(w, rows):
        kept = jnp.where(rows[:, None] >= 0, w[rows], 0)
        return w.at[jnp.where(rows < 0, w.shape[0], rows)].set(0, mode="drop"), kept

    rest, kept = jax.vmap(one)(flat, at)
    q = format(rest.reshape(w.shape), group)
    return dataclasses.replace(q, outliers=kept.reshape(*lead, *kept.shape[1:]), rows=rows)
