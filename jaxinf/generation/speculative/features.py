"""What a head that goes on from the target's features keeps of each row.

Column c of a head is the feature at c and the token at c + 1; it gives the feature at c + 1. While the target has
n tokens in its cache and the latest token stands at n, columns to n - 1 can be read with the target's own features:

    in the head's cache     columns 0 .. L - 1          L = cache.lengths
    waiting                 columns L .. n - 1          their features, n - L of them
    drafted                 columns n, n + 1, ...       features by the head itself, forgotten after the pass
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import Verified
from jaxinf.models import CausalLM
from jaxinf.models.drafting import EagleHead
from sharding.collectives import pmax
from sharding.rules import RULES

ROOM = 16
"""Columns that can wait."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """State of the rows.

    cache: the head's. features: `[B, ROOM, d]`, of the columns that wait. waiting: int32 `[B]`, how many.
    before: a module but the last each, `[B, d]`: what it made of column L - 1.
    """

    cache: Cache
    features: jax.Array
    waiting: jax.Array
    before: tuple[jax.Array, ...]

    @classmethod
    def new(cls, head: EagleHead, target: CausalLM, batch: int, tokens: int, appended: int) -> Reading:
        """For rows of up to `tokens`, and `appended` drafted columns in a pass at most."""
        most = ROOM + appended
        cache = head.init_cache(batch, tokens + most, dtype=target.dtype, max_append=most)
        d = target.spec.d_model
        none = jnp.zeros((batch, ROOM, d), target.dtype)
        before = tuple(jnp.zeros((batch, d), target.dtype) for _ in range(head.spec.modules - 1))
        return cls(cache, none, jnp.zeros((batch,), jnp.int32), before)

    @property
    def ends(self) -> jax.Array:
        """n, int32 `[B]`."""
        return self.cache.lengths + self.waiting

    def read(
        self,
        head: EagleHead,
        target: CausalLM,
        features: jax.Array,
        tokens: jax.Array,
        counts: jax.Array,
        *,
        fresh: bool = False,
    ) -> tuple[Reading, tuple[jax.Array, ...]]:
        """The first `counts` int32 `[B]` of columns `features [B, T, d]`, `tokens [B, T]` go into the cache.

        Returns:
          `(the state, what each module made of each row's last column [B, d])`; nothing that waits is changed.
        """
        cache, given = self.cache, features
        starts, last, made, before = cache.lengths, jnp.maximum(counts - 1, 0)[:, None, None], [], []
        for m in range(head.spec.modules):
            cache = cache.roll_back(starts)
            out, cache = head(target, given, tokens, cache, counts=counts, fresh=fresh, module=m)
            assert cache is not None
            made.append(jnp.take_along_axis(out, last, axis=1)[:, 0])
            if m < head.spec.modules - 1:
                given = jnp.concatenate([self.before[m][:, None], out[:, :-1]], axis=1)
                before.append(jnp.where((counts > 0)[:, None], made[m], self.before[m]))
        return dataclasses.replace(self, cache=cache, before=tuple(before)), tuple(made)

    def prompted(
        self,
        head: EagleHead,
        target: CausalLM,
        tokens: jax.Array,
        counts: jax.Array,
        hidden: jax.Array,
        fresh: bool,
    ) -> Reading:
        """After a piece of the prompts, as `Drafter.read` gets it. The last feature waits for its token."""
        state = self
        if not fresh:
            features = jnp.concatenate([self.features[:, :1], hidden[:, :-1]], axis=1)
            state, _ = self.read(head, target, features, tokens, counts)
        elif tokens.shape[1] > 1:
            most = jnp.maximum(counts - 1, 0)
            state, _ = self.read(head, target, hidden[:, :-1], tokens[:, 1:], most, fresh=True)
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
        some = counts > 0
        features = self.features.at[:, :1].set(jnp.where(some[:, None, None], last, self.features[:, :1]))
        return dataclasses.replace(state, features=features, waiting=jnp.where(some, 1, self.waiting))

    def tokens(self, history: jax.Array, width: int) -> jax.Array:
        """int32 `[B, width]`: the tokens of the columns that wait, by a `history` that ends with the latest one."""
        at = self.cache.lengths[:, None] + 1 + jnp.arange(width)
        return jnp.take_along_axis(history, jnp.minimum(at, history.shape[1] - 1), axis=1)

    def shortened(self, head: EagleHead, target: CausalLM, history: jax.Array, most: int) -> Reading:
        """With at most `most` columns waiting in any row: else all but each row's last go into the cache.

        A loop of one trip or none: a `cond` would copy the cache.
        """
        head_graph, head_weights = nnx.split(head)
        graph, weights = nnx.split(target)

        def long(state: Reading) -> jax.Array:
            return pmax(jnp.max(state.waiting), *RULES["batch"]) > most

        def read(state: Reading) -> Reading:
            # Tied to the trip, or XLA widens all 16-bit weights before the loop and reads them at float32's cost.
            both, waiting = jax.lax.optimization_barrier(((head_weights, weights), state.waiting))
            counts = jnp.maximum(waiting - 1, 0)
            given = nnx.merge(head_graph, both[0]), nnx.merge(graph, both[1])
            after, _ = state.read(*given, state.features, state.tokens(history, ROOM), counts)
            last = jnp.take_along_axis(state.features, counts[:, None, None], axis=1)
            features = state.features.at[:, :1].set(last)
            return dataclasses.replace(after, features=features, waiting=waiting - counts)

        return jax.lax.while_loop(long, read, self)

    def committed(self, head: EagleHead, target: CausalLM, verified: Verified) -> Reading:
        """After a pass of the target: what it says of accepted tokens waits."""
        state = self
        if verified.draft is None:  # draft after draft leaves nothing behind, plain passes do
            state = self.shortened(head, target, verified.history, ROOM - 1)
        width = verified.path.shape[1]
        new = jnp.take_along_axis(verified.hidden, verified.path[:, :, None], axis=1).astype(state.features.dtype)
        place = jnp.arange(width)
        at = jnp.where(place < verified.counts[:, None], state.waiting[:, None] + place, ROOM)
        features = state.features.at[jnp.arange(at.shape[0])[:, None], at].set(new, mode="drop")
        return dataclasses.replace(state, features=features, waiting=state.waiting + verified.counts)
