"""Attention over a cache that is widened some slots at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention
from pallas_kernels.merge import add_partial
from sharding.sequence import add_sinks

BLOCK = 1024
"""Slots that are widened at a time where no kernel reads them as they are."""

Partial = tuple[jax.Array, jax.Array]
"""Attention over some of the keys: `(out [B, N, T, D], log-sum-exp [B, N, T])`, float32."""


def attend_in_blocks(
    q: jax.Array,
    widen: Callable[[Any, int], tuple[jax.Array, jax.Array]],
    total: int,
    *,
    lengths: jax.Array,
    q_offset: jax.Array | None = None,
    window: int | None = None,
    causal: bool = True,
    **mask: Any,
) -> Partial:
    """`flash_attention` over `total` slots, of which no more than a block is in floats at a time.

    What the queries see of each block is merged by its log-sum-exp (Flash-Decoding, Dao et al. 2023, one block
    after another). Blocks past all lengths and before all windows are not touched.

    Args:
      q: `[B, N, T, D]`, rotated.
      widen: `(first slot, size) -> (k, v)` of those slots, `[B, K, size, D]` in q's dtype, keys rotated.
      lengths, q_offset, window, causal, mask: of `flash_attention`, without sinks (`with_sinks`).
    """
    first = jnp.zeros_like(lengths) if q_offset is None else q_offset
    sides = window if causal or window is None else (window - 1, None)

    def part(start: Any, size: int) -> Partial:
        live = jnp.clip(lengths - start, 0, size)
        given: dict[str, Any] = dict(q_offset=first - start, lengths=live, window=sides, causal=causal, **mask)
        return flash_attention(q, *widen(start, size), return_lse=True, **given)

    oldest = jnp.int32(0) if window is None else jnp.maximum(jnp.min(first) - window + 1, 0)
    return add_blocks(q, part, total, oldest, jnp.max(lengths))


def add_blocks(
    q: jax.Array, part: Callable[[Any, int], Partial], total: int, oldest: jax.Array, end: jax.Array
) -> Partial:
    """The sum of `part(first slot, size)`, what q sees of a block of slots, over the blocks of `total` slots that
    have one from `oldest` to before `end`."""
    size = block_size(total)
    state = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    if size == total:
        return add_partial(state, part(0, size))
    last = jnp.clip(-(-end // size), 0, total // size)
    state = jax.lax.fori_loop(oldest // size, last, lambda i, s: add_partial(s, part(i * size, size)), state)
    return add_partial(state, part(total - total % size, total % size)) if total % size else state


def attend_masked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    distance: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
) -> Partial:
    """Attention of few queries with every score written out.

    Args:
      q: `[B, N, T, D]`; k, v: `[B, K, n, D]`, which may be nan where no query sees them.
      seen: bool `[B, T, n]`. distance: int32 `[B, T, n]`, of a key from a query, at most 0 where it is seen.
      scale, softcap, alibi_slopes: as for `flash_attention`.
    """
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    options: Any = dict(precision=exact, preferred_element_type=jnp.float32)
    used = seen.any(1)[:, None, :, None]
    k, v = jnp.where(used, k, 0), jnp.where(used, v, 0)
    rows = q.reshape(batch, groups, -1, tokens, dim)
    x = jnp.einsum("bkstd,bknd->bkstn", rows, k, **options) * (dim**-0.5 if scale is None else scale)
    x = x.reshape(batch, heads, tokens, -1)
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    if alibi_slopes is not None:
        x += alibi_slopes[:, None, None] * distance[:, None].astype(jnp.float32)
    x = jnp.where(seen[:, None], x, -jnp.inf)
    peak = x.max(-1)
    safe = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(x - safe[..., None])
    total = weights.sum(-1)
    rows = weights.astype(q.dtype).reshape(batch, groups, -1, tokens, k.shape[2])
    out = jnp.einsum("bkstn,bknd->bkstd", rows, v, **options).reshape(batch, heads, tokens, -1)
    some = jnp.where(total > 0, total, 1.0)
    return out / some[..., None], jnp.where(total > 0, safe + jnp.log(some), -jnp.inf)


def with_sinks(partial: Partial, sinks: jax.Array | None, dtype, return_lse: bool) -> Any:
    """A sum that is complete, with the logits `sinks` float32 `[N]` in it: what `flash_attention` returns."""
    out, lse = partial
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks), jnp.logaddexp(lse, sinks[:, None])
    out = out.astype(dtype)
    return (out, lse) if return_lse else out


def block_size(total: int) -> int:
    """Slots of a block: the largest power of two up to `BLOCK` that divides the slots, if it is not small; else
    `BLOCK`, and a rest."""
    if total <= BLOCK:
        return total
    size = math.gcd(total, BLOCK)
    return size if size >= BLOCK // 4 else BLOCK


def cut(x: jax.Array, layer, start, size: int) -> jax.Array:
    """`x[layer, :, :, start:start + size]` in one read; layer None: `x` is of one layer."""
    zero = jnp.zeros((), jnp.int32)
    lead = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    shape = x.shape[len(lead) :]
    starts = (*lead, zero, zero, jnp.asarray(start, jnp.int32), *[zero] * (len(shape) - 3))
    found = jax.lax.dynamic_slice(x, starts, (*[1] * len(lead), *shape[:2], size, *shape[3:]))
    return found[0] if lead else found
