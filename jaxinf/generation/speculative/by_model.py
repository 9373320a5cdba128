"""What drafters share that run a smaller model beside the target: its cache, and where its weights lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from jax.sharding import Mesh

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Drafter
from jaxinf.generation.speculative.writing import CATCH_UP
from jaxinf.models import CausalLM
from jaxinf.models.placing import place_model
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class ByModel(Drafter):
    """Drafts come from a model.

    model: any decoder with the target's vocabulary. limit: static, tokens that a row of it may have; None: any.
    """

    model: CausalLM
    limit: int | None = dataclasses.field(default=None, kw_only=True, metadata=dict(static=True))

    @property
    def context(self) -> int | None:
        return self.limit

    def on(self, mesh: Mesh) -> Self:
        return dataclasses.replace(self, model=place_model(self.model, mesh))

    def check(self, target: CausalLM) -> None:
        if self.model.spec.vocab != target.spec.vocab:
            raise InputError(
                f"the draft model has a vocabulary of {self.model.spec.vocab} tokens, but the target's has "
                f"{target.spec.vocab}: take one with the same tokenizer"
            )

    def init(self, target: CausalLM, batch: int, tokens: int) -> Cache:
        # Some layers forget, and as many tokens as one pass appends have to be taken back.
        appended = max(CATCH_UP, self.nodes + 1)
        return self.model.init_cache(batch, tokens + appended, max_append=appended)

    def read(self, target, state: Cache, tokens, counts, hidden, *, fresh: bool) -> Cache:
        _, after, _ = self.model.hidden(tokens, state, counts=counts, fresh=fresh)
        assert after is not None
        return after
