"""Eagle: a small head goes on from the target's features, token by token.

EAGLE: Li et al. 2024, arXiv:2401.15077. With a module a step, as multi-token prediction trains them: DeepSeek-V3,
arXiv:2412.19437, section 2.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Draft, Drafter, Verified, View, check_nodes, with_token
from jaxinf.generation.speculative.features import Reading
from jaxinf.generation.speculative.medusa import check_made_for
from jaxinf.models import CausalLM
from jaxinf.models.drafting import EagleHead
from pallas_kernels.errors import UnsupportedError
from sharding import split_axis
from sharding.collectives import size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eagle(Drafter):
    """A chain. At temperature 0 it drafts the head's likeliest tokens; else it draws them from the head's
    distribution under the target's settings, and rejection keeps the target's exactly.

    head: in the target's dtype. tokens: static, a draft's length at most. target: static, fingerprint of the model
    that the head is for; None: any.
    """

    head: EagleHead
    tokens: int = dataclasses.field(default=4, metadata=dict(static=True))
    target: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    reads_hidden = True

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
        check_made_for(self.target, self.head.spec.d_model, target)

    def init(self, target: CausalLM, batch: int, tokens: int) -> Reading:
        check_whole()
        return Reading.new(self.head, target, batch, tokens, self.tokens)

    def read(self, target, state: Reading, tokens, counts, hidden, *, fresh: bool) -> Reading:
        return state.prompted(self.head, target, tokens, counts, hidden, fresh)

    def draft(self, target: CausalLM, state: Reading, view: View) -> tuple[Draft, Reading, Cache]:
        batch, width, modules = view.tokens.shape[0], self.tokens, self.head.spec.modules
        state, made = read_waiting(self.head, target, state, view, width + 1)
        logits = target.logits(made[0])
        tokens = jnp.zeros((batch, width), jnp.int32)
        probs = jnp.zeros((batch, width, logits.shape[1]), jnp.float32) if view.samples else None
        active = view.active.astype(jnp.int32)

        def choose(j, logits, latest, seen, tokens, probs):
            """Token j of the draft, and what is written down of it."""
            x = view.processed(logits, latest, j, seen)
            if probs is None:
                token = split_axis.argmax(x)
            else:
                token = view.draw(x, j + 1)
                probs = jax.lax.dynamic_update_index_in_dim(probs, split_axis.softmax(x), j, axis=1)
            return token, jax.lax.dynamic_update_index_in_dim(tokens, token, j, axis=1), probs

        def column(head, target, features, token, cache, module):
            """The feature after one more drafted token, `[B, d]`."""
            out, cache = head(target, features[:, None], token[:, None], cache, counts=active, module=module)
            assert cache is not None
            return out[:, 0], cache

        latest, tokens, probs = choose(0, logits, view.tokens, view.seen, tokens, probs)
        cache, seen, features = state.cache, with_token(view.seen, latest), list(made)
        for s in range(1, min(modules, width)):
            # Step s is module s's; those after it read the column too.
            at, new = cache.lengths, list(features)
            for m in range(s, modules):
                new[m], cache = column(self.head, target, features[m - 1], latest, cache.roll_back(at), m)
            features = new
            latest, tokens, probs = choose(s, target.logits(new[s]), latest, seen, tokens, probs)
            seen = with_token(seen, latest)

        head_graph, head_weights = nnx.split(self.head)
        graph, weights = nnx.split(target)

        def step(carry):
            j, cache, feature, latest, seen, tokens, probs = carry
            # Tied to the step, or XLA widens all 16-bit weights before the loop and reads them at float32's cost.
            both, latest = jax.lax.optimization_barrier(((head_weights, weights), latest))
            head, model = nnx.merge(head_graph, both[0]), nnx.merge(graph, both[1])
            feature, cache = column(head, model, feature, latest, cache, modules - 1)
            latest, tokens, probs = choose(j, model.logits(feature), latest, seen, tokens, probs)
            return j + 1, cache, feature, latest, with_token(seen, latest), tokens, probs

        length = jnp.minimum(view.length, width)
        start: Any = (jnp.int32(min(modules, width)), cache, features[modules - 1], latest, seen, tokens, probs)
        _, cache, _, _, _, tokens, probs = jax.lax.while_loop(lambda carry: carry[0] < length, step, start)
        counts = jnp.where(view.active, length, 0)
        state = dataclasses.replace(state, cache=cache.roll_back(state.cache.lengths))
        return Draft(tokens, counts, probs=probs), state, view.cache

    def commit(self, target: CausalLM, state: Reading, verified: Verified) -> Reading:
        return state.committed(self.head, target, verified)


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


def check_whole() -> None:
    """
    Raises:
      UnsupportedError: the mesh in context splits layers.
    """
    if size("tensor") > 1:
        raise UnsupportedError(
            f"heads with attention of their own draft whole on every chip, but tensor={size('tensor')} would split "
            "them: take Medusa heads, a draft model, or tensor=1"
        )
