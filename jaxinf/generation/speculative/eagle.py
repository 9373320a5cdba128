"""Eagle: a small head goes on from the target's features, token by token.

EAGLE: Li et al. 2024, arXiv:2401.15077. With a module a step, as multi-token prediction trains them: DeepSeek-V3,
arXiv:2412.19437, section 2.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified, View, check_nodes
from jaxinf.generation.speculative.features import Reading
from jaxinf.generation.speculative.medusa import check_made_for
from jaxinf.generation.speculative.writing import write_chain
from jaxinf.models import CausalLM
from jaxinf.models.drafting import EagleHead
from sharding import split_axis


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eagle(Drafter):
    """A chain. At temperature 0 it drafts the head's likeliest tokens; else it draws them from the head's
    distribution under the target's settings, and rejection keeps the target's exactly. With several modules the
    likeliest are drafted at any temperature, all of them in every pass.

    head: for the target's features. tokens: static, a draft's length at most. target: static, fingerprint of the
    model that the head is for; None: any. confidence: static, as of `write_chain`.
    """

    head: EagleHead
    tokens: int = dataclasses.field(default=4, metadata=dict(static=True))
    target: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    confidence: float = dataclasses.field(default=0.0, metadata=dict(static=True))

    reads_hidden = True

    @classmethod
    def of(cls, head: EagleHead, ranks: Sequence[Sequence[float]] = (), **options: Any) -> Eagle:
        """A drafter of stored heads. ranks: measured agreement, which a chain does not need."""
        return cls(head, **options)

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def draws(self) -> bool:
        return self.head.spec.modules == 1

    @property
    def steps(self) -> bool:
        return self.head.spec.modules == 1

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        check_made_for(self.target, self.head.spec.d_model, target)

    def init(self, target: CausalLM, batch: int, tokens: int) -> Reading:
        return Reading.new(self.head, target, batch, tokens, self.tokens)

    def read(self, target, state: Reading, tokens, counts, hidden, *, fresh: bool) -> Reading:
        return state.prompted(self.head, target, tokens, counts, hidden, fresh)

    def draft(self, target: CausalLM, state: Reading, view: View) -> tuple[Draft, Reading, Cache]:
        state, made = read_waiting(self.head, target, state, view, self.tokens + 1)
        if self.head.spec.modules > 1:
            draft, cache = self._by_modules(target, state.cache, made, view)
        else:
            logits, forward = target.logits(made[0]), self._further(target, view.active)
            after: Any = (state.cache, made[0])
            draft, after = write_chain(forward, logits, after, view, self.tokens, confidence=self.confidence)
            cache = after[0]
        return draft, dataclasses.replace(state, cache=cache.roll_back(state.cache.lengths)), view.cache

    def commit(self, target: CausalLM, state: Reading, verified: Verified) -> Reading:
        return state.committed(self.head, target, verified)

    def _further(self, target: CausalLM, active: jax.Array) -> Any:
        """`Forward`, of the head's cache and latest feature."""
        head_graph, head_weights = nnx.split(self.head)
        graph, weights = nnx.split(target)

        def forward(tokens: jax.Array, carry: tuple[Cache, jax.Array]):
            # Tied to the step, or XLA widens all 16-bit weights before the loop and reads them at float32's cost.
            fenced, tokens = jax.lax.optimization_barrier(((head_weights, weights), tokens))
            head, model = nnx.merge(head_graph, fenced[0]), nnx.merge(graph, fenced[1])
            feature, cache = _column(head, model, carry[1], tokens, carry[0], active, 0)
            return model.logits(feature), (cache, feature)

        return forward

    def _by_modules(
        self, target: CausalLM, cache: Cache, made: tuple[jax.Array, ...], view: View
    ) -> tuple[Draft, Cache]:
        """The likeliest token after each of the first modules, then after the last again and again.

        made: `[B, d]`, what each module made of the latest token.
        """
        modules, active = self.head.spec.modules, view.active
        latest = split_axis.argmax(target.logits(made[0]))
        tokens, features = [latest], list(made)
        for s in range(1, self.tokens):
            # Modules from that of step s on read the column, each what the one before it made of the last column.
            at, new = cache.lengths, list(features)
            for m in range(min(s, modules - 1), modules):
                given = features[m - 1] if s < modules else features[m]
                new[m], cache = _column(self.head, target, given, latest, cache.roll_back(at), active, m)
            features = new
            latest = split_axis.argmax(target.logits(features[min(s, modules - 1)]))
            tokens.append(latest)
        return Draft(jnp.stack(tokens, axis=1)), cache


def _column(
    head: EagleHead, target: CausalLM, features: jax.Array, tokens: jax.Array, cache: Cache, active, module: int
) -> tuple[jax.Array, Cache]:
    """`[B, d]` and int32 `[B]` -> `(the feature after that token [B, d], the cache with it)`."""
    counts = active.astype(jnp.int32)
    out, cache_after = head(target, features[:, None], tokens[:, None], cache, counts=counts, module=module)
    assert cache_after is not None
    return out[:, 0], cache_after


def read_waiting(
    head: EagleHead, target: CausalLM, state: Reading, view: View, width: int
) -> tuple[Reading, tuple[jax.Array, ...]]:
    """`(the state with nothing waiting in rows that go on, what each module made of the latest token [B, d])`.

    width: static, columns that wait after a draft at most; of more, all but the last are read before.
    """
    state = state.shortened(head, target, view.history, width)
    counts = jnp.where(view.active, state.waiting, 0)
    after, made = state.read(head, target, state.features[:, :width], state.tokens(view.history, width), counts)
    return dataclasses.replace(after, waiting=state.waiting - counts), made
