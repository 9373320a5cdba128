"""Drafts copied from the row's own past (prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding;
LLMA: Yang et al. 2023, arXiv:2304.04487)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Draft, Drafter, View, check_nodes
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptLookup(Drafter):
    """What followed the last tokens when they occurred before, in the prompt or the answer.

    Of all earlier places the one that agrees on the most last tokens is taken, of several the latest.

    tokens: static, a draft's length at most. longest, shortest: static, how many last tokens are compared, and how
    many have to agree.
    """

    tokens: int = dataclasses.field(default=4, metadata=dict(static=True))
    longest: int = dataclasses.field(default=4, metadata=dict(static=True))
    shortest: int = dataclasses.field(default=1, metadata=dict(static=True))

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def free(self) -> bool:
        return True

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        check_nodes("longest", self.longest, 64)
        check_nodes("shortest", self.shortest, 64)
        if self.shortest > self.longest:
            raise InputError(f"shortest={self.shortest} must be at most longest={self.longest}")

    def init(self, target: CausalLM, batch: int, tokens: int) -> tuple[()]:
        return ()

    def draft(self, target: CausalLM, state: Any, view: View) -> tuple[Draft, Any, Cache]:
        tokens, counts = lookup(
            view.history, view.lengths + 1, self.tokens, longest=self.longest, shortest=self.shortest
        )
        return Draft(tokens, counts), state, view.cache


def lookup(
    history: jax.Array, known: jax.Array, width: int, *, longest: int, shortest: int
) -> tuple[jax.Array, jax.Array]:
    """What followed the best earlier occurrence of each row's last tokens.

    Args:
      history: int32 `[B, S]`, of which row b has `known[b]`.
      width: tokens wanted. longest, shortest: as for `PromptLookup`.

    Returns:
      `(tokens int32 [B, width], counts int32 [B])`: how many of them there are, 0 without an occurrence.
    """
    slots = history.shape[1]
    place = jnp.arange(slots)[None]
    last = known[:, None] - 1
    agreed = jnp.zeros(history.shape, jnp.int32)
    alive = jnp.ones(history.shape, bool)
    for n in range(longest):
        suffix = jnp.take_along_axis(history, jnp.maximum(last - n, 0), axis=1)
        shifted = jnp.pad(history, ((0, 0), (n, 0)))[:, :slots]  # history[place - n]
        alive &= (shifted == suffix) & (place >= n) & (last >= n)
        agreed += alive
    fits = (place < last) & (agreed >= shortest)
    score = jnp.where(fits, agreed * slots + place, -1)
    best = jnp.argmax(score, axis=1).astype(jnp.int32)
    found = jnp.max(score, axis=1) >= 0
    at = jnp.clip(best[:, None] + 1 + jnp.arange(width), 0, slots - 1)
    counts = jnp.where(found, jnp.minimum(width, known - 1 - best), 0)
    return jnp.take_along_axis(history, at, axis=1), counts
