"""A smaller model that writes the draft (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, 2302.01318)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified, View, check_nodes, with_token
from jaxinf.generation.step import prefill
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError
from sharding import split_axis
from sharding.collectives import pmax
from sharding.rules import RULES

CATCH_UP = 16
"""Tokens of a pass over what the draft model has not read yet."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftModel(Drafter):
    """Any decoder with the target's vocabulary. At temperature 0 it drafts its likeliest tokens; else it draws them
    from its own distribution under the target's settings, and rejection keeps the target's exactly.

    model: lies where the target does. tokens: static, a draft's length at most. limit: static, tokens that a row of
    the draft model may have; None: any.
    """

    model: CausalLM
    tokens: int = dataclasses.field(default=4, metadata=dict(static=True))
    limit: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def draws(self) -> bool:
        return True

    @property
    def steps(self) -> bool:
        return True

    @property
    def context(self) -> int | None:
        return self.limit

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        if self.model.spec.vocab != target.spec.vocab:
            raise InputError(
                f"the draft model has a vocabulary of {self.model.spec.vocab} tokens, but the target's has "
                f"{target.spec.vocab}: take one with the same tokenizer"
            )

    def init(self, target: CausalLM, batch: int, tokens: int) -> Cache:
        # Some layers forget, and as many tokens as one pass appends have to be taken back.
        appended = max(CATCH_UP, self.tokens + 1)
        return self.model.init_cache(batch, tokens + appended, max_append=appended)

    def read(self, target, state: Cache, tokens, counts, hidden, *, fresh: bool) -> Cache:
        _, after, _ = self.model.hidden(tokens, state, counts=counts, fresh=fresh)
        assert after is not None
        return after

    def draft(self, target: CausalLM, state: Cache, view: View) -> tuple[Draft, Cache, Cache]:
        batch, width = view.tokens.shape[0], self.tokens
        known = view.lengths + 1
        graph, weights = nnx.split(self.model)

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
        cache = jax.lax.while_loop(more, catch_up, state)
        logits, cache = prefill(self.model, view.tail(cache.lengths, 2), behind(cache), cache)
        tokens = jnp.zeros((batch, width), jnp.int32)
        probs = jnp.zeros((batch, width, logits.shape[1]), jnp.float32) if view.samples else None

        def choose(j, logits, latest, seen, tokens, probs):
            """Token j of the draft, and what is written down of it."""
            x = view.processed(logits, latest, j, seen)
            if probs is None:
                token = split_axis.argmax(x)
            else:
                token = view.draw(x, j + 1)
                probs = jax.lax.dynamic_update_index_in_dim(probs, split_axis.softmax(x), j, axis=1)
            return token, jax.lax.dynamic_update_index_in_dim(tokens, token, j, axis=1), probs

        def step(carry):
            j, cache, latest, seen, tokens, probs = carry
            fenced, latest = jax.lax.optimization_barrier((weights, latest))
            active = view.active.astype(jnp.int32)
            logits, cache = prefill(nnx.merge(graph, fenced), latest[:, None], active, cache)
            seen = with_token(seen, latest)
            token, tokens, probs = choose(j, logits, latest, seen, tokens, probs)
            return j + 1, cache, token, seen, tokens, probs

        latest, tokens, probs = choose(0, logits, view.tokens, view.seen, tokens, probs)
        length = jnp.minimum(view.length, width)
        start: Any = (jnp.int32(1), cache, latest, view.seen, tokens, probs)
        carry = jax.lax.while_loop(lambda carry: carry[0] < length, step, start)
        _, cache, _, _, tokens, probs = carry
        counts = jnp.where(view.active, length, 0)
        return Draft(tokens, counts, probs=probs), cache, view.cache

    def commit(self, target: CausalLM, state: Cache, verified: Verified) -> Cache:
        return state.roll_back(jnp.minimum(state.lengths, verified.lengths))
