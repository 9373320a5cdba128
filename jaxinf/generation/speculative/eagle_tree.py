"""Eagle with a tree that grows where the head is sure (EAGLE-2, Li et al. 2024, arXiv:2406.16858)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.cache.base import DECODE_TOKENS
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified, View, check_nodes
from jaxinf.generation.speculative.eagle import read_waiting
from jaxinf.generation.speculative.features import Reading
from jaxinf.generation.speculative.growing import growing, grown
from jaxinf.generation.speculative.medusa import check_made_for
from jaxinf.models import CausalLM
from jaxinf.models.drafting import EagleHead
from pallas_kernels.errors import InputError
from sharding import split_axis


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EagleTree(Drafter):
    """Level by level the `width` candidates of the greatest joint probability get `width` children each, and of all
    candidates the `tokens` most probable are verified (sections 4.1 and 4.2).

    A candidate's joint probability is the product of the head's along its branch, an estimate of the chance that it
    is accepted. It is never more than its parent's, so that what is chosen is a tree.

    head: for the target's features, of one module. levels: static, the longest branch. target: static, fingerprint
    of the model that the head is for; None: any.
    """

    head: EagleHead
    tokens: int = dataclasses.field(default=10, metadata=dict(static=True))
    levels: int = dataclasses.field(default=5, metadata=dict(static=True))
    width: int = dataclasses.field(default=3, metadata=dict(static=True))
    target: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    reads_hidden = True

    @classmethod
    def of(cls, head: EagleHead, ranks: Sequence[Sequence[float]] = (), **options: Any) -> EagleTree:
        """A drafter of stored heads. ranks: measured agreement, which is not needed."""
        return cls(head, **options)

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def depth(self) -> int:
        return self.levels

    @property
    def chain(self) -> bool:
        return False

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        check_nodes("levels", self.levels)
        check_nodes("width", self.width)
        read = self.width * (self.levels - 1)
        if read > DECODE_TOKENS:
            raise InputError(
                f"width={self.width} on levels={self.levels} has the head read {read} candidates, but at most "
                f"{DECODE_TOKENS} can be read: lower one of them"
            )
        if (made := self.width + (self.levels - 1) * self.width**2) < self.tokens:
            raise InputError(
                f"draft_tokens={self.tokens} is more than the {made} candidates that width={self.width} and "
                f"levels={self.levels} give: raise one of them"
            )
        if self.head.spec.modules > 1 or self.head.spec.layer.attention.window is not None:
            raise InputError("trees are drafted by heads of one module whose layers see everything: take a chain")
        check_made_for(self.target, self.head.spec.d_model, target)

    def init(self, target: CausalLM, batch: int, tokens: int) -> Reading:
        return Reading.new(self.head, target, batch, tokens, self.width * self.levels)

    def read(self, target, state: Reading, tokens, counts, hidden, *, fresh: bool) -> Reading:
        return state.prompted(self.head, target, tokens, counts, hidden, fresh)

    def draft(self, target: CausalLM, state: Reading, view: View) -> tuple[Draft, Reading, Cache]:
        batch, width = view.tokens.shape[0], self.width
        state, made = read_waiting(self.head, target, state, view, self.levels + 1)
        lines, counts = jnp.arange(batch)[:, None], jnp.where(view.active, width, 0)
        # Candidates, level after level: tokens, parents among the candidates (0 the root), joint log-probabilities.
        scores, tokens = split_axis.top_k(split_axis.log_softmax(target.logits(made[0])), width)
        parents = [jnp.zeros((batch, width), jnp.int32)]
        values, drafted = [scores], [tokens]
        # The nodes that the head reads on: their numbers among the candidates, and what each sees of those read.
        numbers = jnp.broadcast_to(jnp.arange(1, width + 1), (batch, width))
        features = jnp.broadcast_to(made[0][:, None], (batch, width, made[0].shape[-1]))
        own = jnp.broadcast_to(jnp.eye(width, dtype=bool), (batch, width, width))
        sees, cache, count = own, state.cache, width
        for level in range(1, self.levels):
            cache = growing(cache, sees, written=(level - 1) * width)
            depths = jnp.full((width,), level - 1, jnp.int32)
            features, cache = self.head(target, features, tokens, cache, counts=counts, depths=depths)
            assert cache is not None
            cache = cache.roll_back(state.cache.lengths)
            more, ids = split_axis.top_k(split_axis.log_softmax(target.logits(features)), width)
            joint = (scores[:, :, None] + more).reshape(batch, -1)
            ids, above = ids.reshape(batch, -1), jnp.repeat(numbers, width, axis=1)
            parents.append(above)
            values.append(joint)
            drafted.append(ids)
            if level < self.levels - 1:
                scores, best = jax.lax.top_k(joint, width)
                tokens, source = ids[lines, best], best // width
                numbers, features = count + 1 + best, features[lines, source]
                earlier = sees[:, -width:][lines, source]
                sees = jnp.concatenate(
                    [
                        jnp.pad(sees, ((0, 0), (0, 0), (0, width))),
                        jnp.concatenate([earlier, own], axis=2),
                    ],
                    axis=1,
                )
            count += width * width
        state = dataclasses.replace(state, cache=grown(cache) if self.levels > 1 else cache)
        # Of equals the first is taken, which is never a child before its parent.
        _, chosen = jax.lax.top_k(jnp.concatenate(values, axis=1), self.tokens)
        chosen = jnp.sort(chosen, axis=1)
        tokens = jnp.concatenate(drafted, axis=1)[lines, chosen]
        above = jnp.concatenate(parents, axis=1)[lines, chosen]
        is_parent = above[:, :, None] == chosen[:, None, :] + 1
        place = jnp.where(above == 0, 0, jnp.argmax(is_parent, axis=2) + 1)
        return Draft(tokens, parents=place.astype(jnp.int32)), state, view.cache

    def commit(self, target: CausalLM, state: Reading, verified: Verified) -> Reading:
        return state.committed(self.head, target, verified)
