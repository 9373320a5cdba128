"""How much to draft: as many tokens as pay, by the acceptance seen so far and what passes cost.

With acceptance a of each drafted token and g of them in a row, a pass gives (1 - a^(g+1)) / (1 - a) tokens
(Leviathan et al. 2023, arXiv:2211.17192, equation 1) and takes fixed + token g + verify, in units of a plain step.
The g by which the last row is soonest done is taken, or none where plain steps are about as good: all rows of a
batch share its passes, and drafts that stand in some rows alone keep the others waiting.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sharding.collectives import pmax
from sharding.rules import RULES

_MEMORY = 0.9
"""What a pass leaves of the weight of those before."""
_PRIOR = (0.7, 4.0)
"""Acceptance at first, and how many drafted tokens it weighs."""
_PROBE = 24
_LONGEST_WAIT = 768
"""Plain steps before drafting is tried again, at first and at most: it doubles each time that it does not pay."""
_TRIES = 0.02
"""Part of the time that such tries may take where nothing stands: dear ones wait longer."""
_MARGIN = 1.1
"""How much faster than plain steps drafts must promise to be: what they cost is known to a tenth or so."""


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
    depth: static, the longest branch of a draft. steps: static, whether drafts may be shorter.
    chain: static, whether drafts are chains, whose tokens stand at one rate; of trees it counts how many stood in a
      pass.
    """

    stood: jax.Array
    judged: jax.Array
    passes: jax.Array
    idle: jax.Array
    wait: jax.Array
    depth: int = dataclasses.field(metadata=dict(static=True))
    chain: bool = dataclasses.field(metadata=dict(static=True))
    steps: bool = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def new(cls, batch: int, depth: int, *, chain: bool, steps: bool) -> Policy:
        rate, weight = _PRIOR
        # The tokens that a whole draft is worth at that rate, for as many passes as judge so many of them.
        a_pass = sum(rate**i for i in range(1, depth + 1))
        judged = sum(rate**i for i in range(depth))

        def full(value: float) -> jax.Array:
            return jnp.full((batch,), value, jnp.float32)

        passes = weight / judged
        scalars = jnp.zeros((), jnp.int32), jnp.full((), _PROBE, jnp.int32)
        return cls(full(passes * a_pass), full(weight), full(passes), *scalars, depth, chain, steps)

    def gains(self, costs: Costs, left: jax.Array) -> jax.Array:
        """float32 `[depth]`: how many times as fast as plain steps drafts of 1..depth tokens should be, 0 for those
        that are not made. left: int32 `[B]`, tokens that rows have yet to write; 0 of those that have ended."""
        if self.chain:
            rate = jnp.minimum(self.stood / self.judged, 0.99)
            tokens = jnp.cumsum(rate[:, None] ** jnp.arange(self.depth + 1), axis=1)[:, 1:]
        else:
            tokens = jnp.broadcast_to((1.0 + self.stood / self.passes)[:, None], (*self.stood.shape, self.depth))
        passes = pmax(jnp.max(left[:, None] / tokens, axis=0), *RULES["batch"])
        alone = pmax(jnp.max(left), *RULES["batch"])  # plain steps
        lengths = jnp.arange(1, self.depth + 1)
        gains = alone / (jnp.maximum(passes, 1e-6) * costs.of(lengths))
        return jnp.where(lengths >= (1 if self.steps else self.depth), gains, 0.0)

    def length(self, costs: Costs, left: jax.Array) -> jax.Array:
        """int32 scalar: tokens to draft; 0: a plain step. left: as for `gains`."""
        gains = self.gains(costs, left)
        best = jnp.argmax(gains).astype(jnp.int32) + 1
        patience = jnp.maximum(self.wait, (costs.of(best) - 1.0) / _TRIES)
        return jnp.where((jnp.max(gains) > _MARGIN) | (self.idle >= patience), best, 0)

    def after_plain(self, offered: jax.Array | None = None, stands: jax.Array | None = None) -> Policy:
        """offered, stands: bool `[B]`, whether a chain was drafted that was not worth verifying, and whether the
        plain step wrote its first token; where nothing was drafted, None."""
        new = dataclasses.replace(self, idle=self.idle + 1)
        if offered is None or stands is None:
            return new
        keep = jnp.where(offered, _MEMORY, 1.0)
        return dataclasses.replace(
            new,
            stood=keep * self.stood + (offered & stands),
            judged=keep * self.judged + offered,
        )

    def after_draft(
        self, costs: Costs, stood: jax.Array, reach: jax.Array, active: jax.Array, left: jax.Array
    ) -> Policy:
        """After a pass in which `stood` int32 `[B]` of drafts that reached `reach` int32 `[B]` ahead stood.

        active: bool `[B]`, rows that the pass was for. left: as for `gains`, after it.
        """
        seen = active & (reach > 0)
        keep = jnp.where(seen, _MEMORY, 1.0)
        new = dataclasses.replace(
            self,
            stood=keep * self.stood + jnp.where(seen, stood, 0),
            judged=keep * self.judged + jnp.where(seen, jnp.minimum(stood + 1, reach), 0),
            passes=keep * self.passes + seen,
        )
        pays = jnp.max(new.gains(costs, left)) > _MARGIN
        tried = self.idle > 0
        longer = jnp.minimum(2 * self.wait, _LONGEST_WAIT)
        wait = jnp.where(pays, _PROBE, jnp.where(tried, longer, self.wait))
        return dataclasses.replace(new, idle=jnp.zeros_like(self.idle), wait=wait.astype(jnp.int32))
