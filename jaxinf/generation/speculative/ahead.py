"""The target drafts at look-ahead tokens of its own (PaSS: Monea et al. 2023, arXiv:2311.13581)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.sampling import Context, row_keys, sample
from jaxinf.generation.speculative.drafter import (
    MOST_NODES,
    Draft,
    Drafter,
    View,
    check_nodes,
    with_token,
)
from jaxinf.generation.speculative.medusa import check_made_for
from jaxinf.models import CausalLM
from jaxinf.models.drafting import AheadTokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaSS(Drafter):
    """A pass of the target over the latest token and L look-ahead tokens drafts L + 1 tokens; the next pass
    verifies them. The first is what the target says after the latest token, so that two passes give two tokens or
    more. No memory is needed but L embeddings: keys of drafting lie past the rows' lengths.

    Candidates are drawn with the keys by which the target will draw there, so that they are given, and those of
    sampled rows are right as often as two draws with the same noise agree.

    ahead: on the target's device. tokens: static, of a draft at most; None: L + 1.
    target: static, fingerprint of the model that the embeddings are for; None: any.
    """

    ahead: AheadTokens
    tokens: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    target: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def nodes(self) -> int:
        return self.ahead.spec.tokens + 1 if self.tokens is None else self.tokens

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.nodes, min(MOST_NODES, self.ahead.spec.tokens + 1))
        check_made_for(self.target, self.ahead.spec.d_model, target)

    def init(self, target: CausalLM, batch: int, tokens: int) -> tuple[()]:
        return ()

    def draft(self, target: CausalLM, state: Any, view: View) -> tuple[Draft, Any, Cache]:
        nodes = self.nodes
        columns = jnp.pad(view.tokens[:, None], ((0, 0), (0, nodes - 1)))
        embedded = self.ahead.embed[...][: nodes - 1]
        counts = jnp.where(view.active, nodes, 0)
        hidden, cache, _ = target.hidden(columns, view.cache, counts=counts, ahead=embedded)
        assert cache is not None
        logits = target.logits(hidden)
        tokens, seen = view.tokens, view.seen
        drafted = []
        for i in range(nodes):
            context = Context(tokens, view.emitted + i, seen, view.vocab)
            keys = row_keys(view.seeds, view.emitted + i)
            tokens = sample(logits[:, i], view.controls, keys, context=context, processors=view.processors)
            seen = with_token(seen, tokens)
            drafted.append(tokens)
        return Draft(jnp.stack(drafted, axis=1)), state, cache.roll_back(view.lengths)
