"""A small model writes, a big one puts right what it finds unlikely (BiLD: Kim et al. 2023, arXiv:2302.07863)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.speculative.accept import by_threshold
from jaxinf.generation.speculative.by_model import ByModel
from jaxinf.generation.speculative.drafter import Draft, Verified, View, check_nodes
from jaxinf.generation.speculative.self_speculative import check_confidence
from jaxinf.generation.speculative.writing import further, read_on, write_chain
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BigLittle(ByModel):
    """NOT exact: the output is neither the target's nor distributed as its, but a mixture that follows the small
    model wherever the target has nothing much against it.

    The small model writes its likeliest tokens (draws, where rows are sampled) until it is unsure (the fall-back
    policy); then the target reads them, goes back to the first that it finds too unlikely (the roll-back policy),
    and writes the next one itself.

    tokens: static, that the small model writes at most before it is read.
    fallback: static, the probability that its likeliest token must have for it to go on.
    rollback: static, in nats: -log p of a token under the target may be so much. 0 lets the target's certainties
      alone stand; infinity everything.
    """

    tokens: int = dataclasses.field(default=8, metadata=dict(static=True))
    fallback: float = dataclasses.field(default=0.5, metadata=dict(static=True))
    rollback: float = dataclasses.field(default=2.0, metadata=dict(static=True))

    exact: ClassVar[bool] = False

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def steps(self) -> bool:
        return True

    @property
    def rule(self) -> Callable[..., Any]:
        return functools.partial(by_threshold, distance=self.rollback)

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        super().check(target)
        check_confidence("fallback", self.fallback)
        if isinstance(self.rollback, bool) or math.isnan(self.rollback) or self.rollback < 0:
            raise InputError(f"rollback={self.rollback!r} must be a number of nats, at least 0")

    def draft(self, target: CausalLM, state: Cache, view: View) -> tuple[Draft, Cache, Cache]:
        logits, cache = read_on(self.model, state, view)
        forward = further(self.model, view.active)
        draft, cache = write_chain(forward, logits, cache, view, self.tokens, confidence=self.fallback)
        return dataclasses.replace(draft, probs=None), cache, view.cache

    def commit(self, target: CausalLM, state: Cache, verified: Verified) -> Cache:
        return state.roll_back(jnp.minimum(state.lengths, verified.lengths))
