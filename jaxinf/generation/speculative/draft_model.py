"""A smaller model that writes the draft (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, 2302.01318)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.speculative.by_model import ByModel
from jaxinf.generation.speculative.drafter import Draft, Verified, View, check_nodes
from jaxinf.generation.speculative.writing import further, read_on, write_chain
from jaxinf.models import CausalLM


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftModel(ByModel):
    """Any decoder with the target's vocabulary. At temperature 0 it drafts its likeliest tokens; else it draws them
    from its own distribution under the target's settings, and rejection keeps the target's exactly.

    tokens: static, a draft's length at most.
    """

    tokens: int = dataclasses.field(default=4, metadata=dict(static=True))

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def draws(self) -> bool:
        return True

    @property
    def steps(self) -> bool:
        return True

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        super().check(target)

    def draft(self, target: CausalLM, state: Cache, view: View) -> tuple[Draft, Cache, Cache]:
        logits, cache = read_on(self.model, state, view)
        draft, cache = write_chain(further(self.model, view.active), logits, cache, view, self.tokens)
        return draft, cache, view.cache

    def commit(self, target: CausalLM, state: Cache, verified: Verified) -> Cache:
        return state.roll_back(jnp.minimum(state.lengths, verified.lengths))
