"""Log-probabilities of given tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.models import CausalLM
from sharding import split_axis, zigzag


def target_logprobs(
    model: CausalLM,
    tokens: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    cache: Cache | None = None,
    *,
    fresh: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """How likely the model finds `targets[b, t]` after `tokens[b, :t + 1]` and what the cache holds.

    Logits are computed some positions at a time: never `[B, T, V]` at once.

    Args:
      tokens, targets: int32 `[B, T]`; columns past `counts[b]` are padding. counts: int32 `[B]`.
      cache: what came before; None: nothing.
      fresh: static; the cache is empty.

    Returns:
      `(log-probabilities float32 [B, T], unspecified past the counts; the cache after)`.
    """
    split = zigzag.splits(tokens.shape[1], cache is None or fresh)
    hidden, cache, _ = model.hidden(tokens, cache, counts=counts, fresh=fresh)
    targets = zigzag.share(targets) if split else targets
    batch, total, _ = hidden.shape
    size = min(total, max(16, 256 // batch))
    pad = -total % size

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    def part(inputs):
        h, wanted = inputs
        logits = model.logits(h)
        return split_axis.take(logits, wanted) - split_axis.log_sum_exp(logits)

    scores = jax.lax.map(part, (cut(hidden), cut(targets)))
    scores = scores.swapaxes(0, 1).reshape(batch, -1)[:, :total]
    return zigzag.whole(scores, total=tokens.shape[1]) if split else scores, cache
