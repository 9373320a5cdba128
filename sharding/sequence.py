"""Attention whose keys lie on several chips: which form a split pass takes, and the merging of partial results."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from sharding.collectives import pmax, psum, size
from sharding.ring import ring_attention, ring_steps
from sharding.ulysses import refusal, ulysses_attention
from sharding.zigzag import AXIS

Form = Literal["ring", "ulysses"]

FLOPS_A_BYTE = 4096
"""What a chip computes while it sends a byte over one link: 197e12 / 50e9 on a v5e, 918e12 / 100e9 on a v6e (peak
rates and bandwidth of the interconnect from cloud.google.com/tpu/docs)."""


def choose(
    heads: int, kv_heads: int, tokens: int, head_dim: int, itemsize: int, chips: int, window: int | None = None
) -> Form:
    """The form whose transfers are exposed the least, in bytes a chip and pass.

    With T local tokens, C = T / 2, n steps of the ring that each send 2 K h D i bytes (h = T tokens, or C under a
    window that needs few steps) behind 8 N C^2 D FLOP (8 N C W D under a window W < C):

        ring:    n max(0, 2 K h D i - 8 N C^2 D / FLOPS_A_BYTE)
        ulysses: (s - 1) / s (2 N + 2 max(K, s)) T D i     which nothing hides

    Args:
      heads, kv_heads: on each chip before the exchange. tokens: local ones. itemsize: bytes of a number.
    """
    if chips == 1 or refusal(heads, kv_heads, chips) is not None:
        return "ring"
    chunk = tokens // 2
    forwards, backwards = ring_steps(chips, chunk, window)
    sent = 2 * kv_heads * (chunk if backwards else tokens) * head_dim * itemsize
    flops = 8 * heads * chunk * head_dim * min(chunk, window or chunk)
    ring = (forwards + backwards) * max(0.0, sent - flops / FLOPS_A_BYTE)
    exchanged = 2 * (heads + max(kv_heads, chips)) * tokens * head_dim * itemsize * (chips - 1) / chips
    return "ring" if ring <= exchanged else "ulysses"


def sequence_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, axis: str = AXIS, form: Form | None = None, **options: Any
):
    """`ring_attention` or `ulysses_attention`, which take and return the same; None: `choose` says which."""
    if form is None:
        sizes = q.shape[1], k.shape[1], q.shape[2], q.shape[3], q.dtype.itemsize
        form = choose(*sizes, size(axis), options.get("window"))
    attend = ring_attention if form == "ring" else ulysses_attention
    return attend(q, k, v, axis=axis, **options)


def merge_chips(out: jax.Array, lse: jax.Array, *axes: str) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of all chips from attention over each chip's (Dao et al. 2023, Flash-Decoding).

    Args:
      out: `[..., D]`; lse: float32 `[...]`, -inf where a chip has no key to see.

    Returns:
      The same for all keys, float32, on every chip of the axes.
    """
    top = pmax(lse, *axes)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(lse - safe)
    out, total = psum((out.astype(jnp.float32) * weight[..., None], weight), *axes)
    return finish(out, total, safe)


def finish(out: jax.Array, total: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of weighted values and of weights, relative to `peak`, as output and log-sum-exp."""
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return out / total[..., None], jnp.where(some, jnp.log(total) + peak, -jnp.inf)


def add_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> jax.Array:
    """`out [B, N, T, D]`, float32, once the logits `sinks` float32 `[N]` have joined the softmax of `lse`."""
    return out * jax.nn.sigmoid(lse - sinks[:, None])[..., None]
