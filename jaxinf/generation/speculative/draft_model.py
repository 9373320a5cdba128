"""A smaller model that writes the draft (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, 2302.01318)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified, View, check_nodes
from jaxinf.generation.speculative.writing import CATCH_UP, further, read_on, write_chain
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError


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
        logits, cache = read_on(self.model, state, view)
        draft, cache = write_chain(further(self.model, view.active), logits, cache, view, self.tokens)
        return draft, cache, view.cache

    def commit(self, target: CausalLM, state: Cache, verified: Verified) -> Cache:
        return state.roll_back(jnp.minimum(state.lengths, verified.lengths))
