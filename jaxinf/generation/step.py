"""The two pure steps of generation, for those who jit their own loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.models import CausalLM
from sharding import zigzag


def prefill(
    model: CausalLM, tokens: jax.Array, counts: jax.Array, cache: Cache, *, fresh: bool = False
) -> tuple[jax.Array, Cache]:
    """Appends prompts, or pieces of prompts, to the cache.

    Args:
      model: a pytree, so `jax.jit(prefill, static_argnames="fresh", donate_argnames="cache")` works.
      tokens: int32 `[B, T]`; row b's first `counts[b]` are real, the rest padding that is not stored.
      counts: int32 `[B]`, 0 to T.
      cache: what came before, with room for the real tokens (`model.init_cache`).
      fresh: static; promises that the cache is empty, which saves reading it.

    Returns:
      `(logits float32 [B, V], cache)`: the logits after each row's last real token; of no meaning in a row
      whose count is 0.
    """
    hidden, after, _ = model.hidden(tokens, cache, counts=counts, fresh=fresh)
    assert after is not None
    if zigzag.splits(tokens.shape[1], fresh):
        return model.logits(zigzag.take_last(hidden, counts)), after
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), after


def decode_step(
    model: CausalLM, tokens: jax.Array, cache: Cache, *, counts: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Appends one token a row.

    Args:
      model: a pytree, as for `prefill`.
      tokens: int32 `[B]`.
      cache: what came before.
      counts: int32 `[B]` of 0 and 1; a row of 0 stores nothing and its logits have no meaning. None: all 1.

    Returns:
      `(logits float32 [B, V], cache)`.
    """
    hidden, after, _ = model.hidden(tokens[:, None], cache, counts=counts)
    assert after is not None
    return model.logits(hidden[:, 0]), after
