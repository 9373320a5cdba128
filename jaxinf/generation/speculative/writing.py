"""What drafters that are language models share: reading what is new, and writing a chain of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Draft, View, with_token
from jaxinf.generation.step import prefill
from jaxinf.models import CausalLM
from sharding import split_axis
from sharding.collectives import pmax
from sharding.rules import RULES

CATCH_UP = 16
"""Tokens of a pass over what the draft model has not read yet."""

Forward = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
"""`(tokens int32 [B], cache) -> (logits float32 [B, V], the cache with them)`."""


def read_on(model: CausalLM, cache: Cache, view: View) -> tuple[jax.Array, Cache]:
    """Reads whatever rows have that `cache`, the draft model's own, has not, the latest token included.

    Returns:
      `(logits float32 [B, V] after the latest token, the cache)`.
    """
    known = view.lengths + 1
    graph, weights = nnx.split(model)

    def behind(cache: Cache) -> jax.Array:
        return jnp.where(view.active, known - cache.lengths, 0)

    def more(cache: Cache) -> jax.Array:
        return pmax(jnp.max(behind(cache)), *RULES["batch"]) > 2

    def catch_up(cache: Cache) -> Cache:
        fenced, lengths = jax.lax.optimization_barrier((weights, cache.lengths))
        counts = jnp.clip(behind(cache) - 1, 0, CATCH_UP)
        _, after, _ = nnx.merge(graph, fenced).hidden(view.tail(lengths, CATCH_UP), cache, counts=counts)
        assert after is not None
        return after

    # After plain steps there is more to read than the last draft's token and what followed it.
    cache = jax.lax.while_loop(more, catch_up, cache)
    return prefill(model, view.tail(cache.lengths, 2), behind(cache), cache)


def write_chain(
    forward: Forward,
    logits: jax.Array,
    cache: Cache,
    view: View,
    width: int,
    *,
    draws: bool = True,
    confidence: float = 0.0,
) -> tuple[Draft, Cache]:
    """Drafts up to `min(view.length, width)` tokens, one after another.

    Args:
      forward: one token further. It runs within a loop: its weights are to be fenced there.
      logits: float32 `[B, V]`, after the latest token. cache: with that token.
      draws: static; where rows are sampled, tokens are drawn and `probs` reported, else the likeliest are taken.
      confidence: static; a row's draft ends before a token that has no candidate of at least this probability.
        What was drafted before decides that alone, so that the rules of acceptance stay exact.

    Returns:
      `(draft, the cache with all drafted tokens but the last)`.
    """
    batch, length = view.tokens.shape[0], jnp.minimum(view.length, width)
    tokens = jnp.zeros((batch, width), jnp.int32)
    probs = jnp.zeros((batch, width, logits.shape[1]), jnp.float32) if draws and view.samples else None
    counts = jnp.where(view.active, length, 0)

    def choose(j, logits, latest, seen, counts, tokens, probs):
        """Token j of the draft, and what is written down of it."""
        x = view.processed(logits, latest, j, seen)
        if confidence > 0:
            sure = jnp.exp(split_axis.maximum(split_axis.log_softmax(logits))) >= confidence
            counts = jnp.where(sure, counts, jnp.minimum(counts, j))
        if probs is None:
            token = split_axis.argmax(x)
        else:
            token = view.draw(x, j + 1)
            probs = jax.lax.dynamic_update_index_in_dim(probs, split_axis.softmax(x), j, axis=1)
        return token, counts, jax.lax.dynamic_update_index_in_dim(tokens, token, j, axis=1), probs

    def more(carry):
        j, counts = carry[0], carry[4]
        if confidence == 0:
            return j < length
        return pmax(jnp.max(counts), *RULES["batch"]) > j

    def step(carry):
        j, cache, latest, seen, counts, tokens, probs = carry
        logits, cache = forward(latest, cache)
        seen = with_token(seen, latest)
        token, counts, tokens, probs = choose(j, logits, latest, seen, counts, tokens, probs)
        return j + 1, cache, token, seen, counts, tokens, probs

    latest, counts, tokens, probs = choose(0, logits, view.tokens, view.seen, counts, tokens, probs)
    start: Any = (jnp.int32(1), cache, latest, view.seen, counts, tokens, probs)
    _, cache, _, _, counts, tokens, probs = jax.lax.while_loop(more, step, start)
    return Draft(tokens, counts, probs=probs), cache


def further(model: CausalLM, active: jax.Array, **options: Any) -> Forward:
    """`Forward` of a model, for rows that are `active` bool `[B]`. options: of `CausalLM.hidden`."""
    graph, weights = nnx.split(model)

    def forward(tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        fenced, tokens = jax.lax.optimization_barrier((weights, tokens))
        net = nnx.merge(graph, fenced)
        hidden, after, _ = net.hidden(tokens[:, None], cache, counts=active.astype(jnp.int32), **options)
        assert after is not None
        return net.logits(hidden[:, 0]), after

    return forward
