"""How much to draft: as many tokens as pay, by the acceptance seen so far and what passes cost.

With acceptance a of each drafted token and g of them in a row, a pass gives (1 - a^(g+1)) / (1 - a) tokens
(Leviathan et al. 2023, arXiv:2211.17192, equation 1) and takes fixed + token g + verify, in units of a plain step.
The g with the most tokens for the time is taken, or none where a plain step is as good.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sharding.collectives import psum
from sharding.rules import RULES

_MEMORY = 0.9
"""What a pass leaves of the weight of those before."""
_PRIOR = (0.7, 4.0)
"""Acceptance at first, and how many drafted tokens it weighs."""
_PROBE = 24
_LONGEST_WAIT = 768
"""Plain steps before drafting is tried again, at first and at most: it doubles each time that it does not pay."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Costs:
    """What the parts of a pass take, in plain steps of the target; float32 scalars.

    verify: the target's pass over latest token and draft; 0: verify even where nothing was drafted. fixed: of a
    draft, whatever its length. token: of each token drafted in a row.
    """

    verify: jax.Array | float
    fixed: jax.Array | float = 0.0
    token: jax.Array | float = 0.0

    def of(self, length: jax.Array | int) -> jax.Array:
        return jnp.asarray(self.verify + self.fixed + self.token * length, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Policy:
    """What is known of B rows.

    stood, judged: float32 `[B]`, drafted tokens that stood and that were judged, later passes weighing more.
    passes: float32 `[B]`, passes by the same weights.
    idle: int32 scalar, plain steps since the last draft. wait: int32 scalar, how many there may be.
    depth: static, the longest branch of a draft.
    """

    stood: jax.Array
    judged: jax.Array
    passes: jax.Array
    idle: jax.Array
    wait: jax.Array
    depth: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def new(cls, batch: int, depth: int) -> Policy:
        rate, weight = _PRIOR
        # The tokens that a whole draft is worth at that rate, for as many passes as judge so many of them.
        a_pass = sum(rate**i for i in range(1, depth + 1))
        judged = sum(rate**i for i in range(depth))

        def full(value: float) -> jax.Array:
            return jnp.full((batch,), value, jnp.float32)

        passes = weight / judged
        scalars = jnp.zeros((), jnp.int32), jnp.full((), _PROBE, jnp.int32)
        return cls(full(passes * a_pass), full(weight), full(passes), *scalars, depth)

    def gains(self, costs: Costs, active: jax.Array, *, steps: bool) -> jax.Array:
        """float32 `[depth]`: how many times as fast as plain steps drafts of 1..depth tokens should be.

        steps: static; drafts may be shorter than `depth`, else only the last entry is not 0."""
        weight = active.astype(jnp.float32)
        rows = jnp.maximum(psum(jnp.sum(weight), *RULES["batch"]), 1.0)
        if not steps:
            each = 1.0 + self.stood / self.passes
            mean = psum(jnp.sum(each * weight), *RULES["batch"]) / rows
            gain = mean / costs.of(self.depth)
            return jnp.zeros((self.depth,), jnp.float32).at[-1].set(gain)
        rate = jnp.minimum(self.stood / self.judged, 0.99)
        powers = jnp.cumsum(rate[:, None] ** jnp.arange(self.depth + 1), axis=1)[:, 1:]
        mean = psum(jnp.sum(powers * weight[:, None], axis=0), *RULES["batch"]) / rows
        return mean / costs.of(jnp.arange(1, self.depth + 1))

    def length(self, costs: Costs, active: jax.Array, *, steps: bool) -> jax.Array:
        """int32 scalar: tokens to draft; 0: a plain step."""
        gains = self.gains(costs, active, steps=steps)
        best = jnp.argmax(gains).astype(jnp.int32) + 1
        return jnp.where((jnp.max(gains) > 1.0) | (self.idle >= self.wait), best, 0)

    def after_plain(self) -> Policy:
        return dataclasses.replace(self, idle=self.idle + 1)

    def after_draft(
        self, costs: Costs, stood: jax.Array, reach: jax.Array, active: jax.Array, *, steps: bool
    ) -> Policy:
        """After a pass in which `stood` int32 `[B]` of drafts that reached `reach` int32 `[B]` ahead stood."""
        seen = active & (reach > 0)
        keep = jnp.where(seen, _MEMORY, 1.0)
        new = dataclasses.replace(
            self,
            stood=keep * self.stood + jnp.where(seen, stood, 0),
            judged=keep * self.judged + jnp.where(seen, jnp.minimum(stood + 1, reach), 0),
            passes=keep * self.passes + seen,
        )
        pays = jnp.max(new.gains(costs, active, steps=steps)) > 1.0
        tried = self.idle > 0
        longer = jnp.minimum(2 * self.wait, _LONGEST_WAIT)
        wait = jnp.where(pays, _PROBE, jnp.where(tried, longer, self.wait))
        return dataclasses.replace(new, idle=jnp.zeros_like(self.idle), wait=wait.astype(jnp.int32))
