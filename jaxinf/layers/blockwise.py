"""Feed-forward parts of long passes, block by block of tokens (Liu and Abbeel 2023, arXiv:2305.19370)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import chips

SHARE = 64
"""What a block holds beside its tokens is at most this part of the chip's memory."""

LEAST = 512
"""Tokens of a block at least: fewer would take longer to compute than their weights to read."""


def block_tokens(token_bytes: int) -> int:
    """Tokens of a block, if each takes so many bytes: a power of two. On a v5e Llama 8B's 170 kB give 1024."""
    fitting = int(chips.current().hbm / SHARE) // max(1, token_bytes)
    return max(LEAST, 1 << fitting.bit_length() - 1) if fitting else LEAST


def by_blocks(
    function: Callable[..., tuple[jax.Array, jax.Array]], size: int, *arrays: Any
) -> tuple[jax.Array, jax.Array]:
    """`function(*arrays)`, which treats tokens one by one, of at most `size` tokens at a time, a column at least.

    Args:
      function: of arrays `[B, T, ..]`, to one like the first and a scalar, of which the mean over blocks is taken.
      arrays: `[B, T, ..]`, or None.
    """
    rows, total = arrays[0].shape[:2]
    size = max(1, size // rows)
    if total <= size:
        return function(*arrays)
    count = -(-total // size)

    def block(i, carry):
        out, loss = carry
        start = jnp.minimum(i * size, total - size)  # the last one may overlap: it computes the same again

        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, 1)

        part, extra = function(*map(cut, arrays))
        return jax.lax.dynamic_update_slice_in_dim(out, part, start, 1), loss + extra

    out, loss = jax.lax.fori_loop(0, count, block, (jnp.zeros_like(arrays[0]), jnp.zeros((), jnp.float32)))
    return out, loss / count
