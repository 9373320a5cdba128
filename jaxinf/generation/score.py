"""Log-probabilities of given tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.models import CausalLM


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
    hidden, cache, _ = model.hidden(tokens, cache, counts=counts, fresh=fresh)
    batch, total, _ = hidden.shape
    size = min(total, max(16, 256 // batch))
    pad = -total % size

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    def part(inputs):
        h, wanted = inputs
        scores = jax.nn.log_softmax(model.logits(h), axis=-1)
        return jnp.take_along_axis(scores, wanted[..., None], axis=-1)[..., 0]

    scores = jax.lax.map(part, (cut(hidden), cut(targets)))
    return scores.swapaxes(0, 1).reshape(batch, -1)[:, :total], cache
