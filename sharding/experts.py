"""Tokens to the chips that hold their experts, and what the experts make of them back, over the `expert` axis.

Each chip has its own tokens and the matrices of experts/chips experts. Every chip first learns where all tokens go
(their experts and weights, a few bytes a token); then one of two forms moves the rows. Neither drops a token,
whatever the load, and the shapes of both are static.

- Gathered, for few tokens: every chip gets all rows, computes what its experts add to each, and a reduce-scatter
  sums that up. Sent by each chip: `tokens * (chips - 1) * d` numbers, and as many float32 back.
- Exchanged, for many: a row goes once to each chip that has some of its experts, is weighed and summed there, and
  one row comes back. Sent: `2 * tokens * (chips - 1) * q * d` numbers, where q is the chance that a chip has any of
  a token's experts (`reached`). On TPUs this is a ragged all-to-all, which sends just these rows; elsewhere a plain
  one with room for the worst case.

Lepikhin et al. 2020 (GShard) and Fedus et al. 2021 (Switch) send to a fixed capacity of rows an expert and drop
what exceeds it; Rajbhandari et al. 2022 (DeepSpeed-MoE) discuss the same exchange for inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sharding.collectives import all_gather, all_to_all, index, reduce_scatter, size

PLAN_BYTES = 1 << 21
"""What an exchange must save to be worth its plan, the sorting of tokens by destination: a v5e sends this much over
one axis in the time that the plan takes there by the static model, some 20 microseconds."""

WINDOW, LEAST_WINDOW = 1.5, 1024
"""Pairs of a row and an expert that a chip serves at a time: so many times its share of a balanced load, and at
least so many. More come one window after the other, which bounds memory whatever the load."""


class Serve(Protocol):
    """What the experts of this chip add to rows: the weighed sum of their outputs.

    Takes `rows [R, d]`, `local` int32 `[R, k]` (places of experts among those of this chip; their number where
    there is none) and `weights` float32 `[R, k]`, and gives float32 `[R, d]`.

    With `count` and `window` (static) it takes and gives `[R, ...]`, rows of d numbers in any shape: the first
    `count` rows alone have experts, those are in front of what is none, and `window` pairs of a row and an expert
    are to be served at a time.
    """

    def __call__(self, rows: jax.Array, local: jax.Array, weights: jax.Array, /, **window: Any) -> jax.Array: ...


def reached(experts: int, top_k: int, chips: int) -> float:
    """The chance that a chip has any of a token's `top_k` experts, when all are as likely."""
    elsewhere = experts - experts // chips
    return 1 - math.prod(max(elsewhere - i, 0) / (experts - i) for i in range(top_k))


def gathered_bytes(tokens: int, d: int, itemsize: int, chips: int) -> int:
    """Bytes of rows that each chip sends in the gathered form; `tokens` are those of one chip."""
    return tokens * (chips - 1) * d * (itemsize + 4)


def exchanged_bytes(tokens: int, d: int, itemsize: int, chips: int, *, experts: int, top_k: int) -> float:
    """Bytes of rows that each chip sends in the exchanged form on average, when all experts are as likely."""
    return 2 * tokens * (chips - 1) * reached(experts, top_k, chips) * d * itemsize


def exchanges(tokens: int, d: int, itemsize: int, chips: int, *, experts: int, top_k: int) -> bool:
    """Whether `spread` exchanges rows, rather than gathers them: it sends fewer bytes, by what its plan costs."""
    saved = gathered_bytes(tokens, d, itemsize, chips) - exchanged_bytes(
        tokens, d, itemsize, chips, experts=experts, top_k=top_k
    )
    return saved > PLAN_BYTES


def spread(x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: int, serve: Serve) -> jax.Array:
    """What all experts add to this chip's tokens, wherever the experts are.

    Args:
      x: `[N, d]`, tokens of this chip of the `expert` axis.
      chosen: int32 `[N, k]`, their experts, each at most once; weights: float32 `[N, k]`.
      experts: on all chips together, a multiple of the chips.
      serve: computes with the experts of this chip.

    Returns:
      float32 `[N, d]`; partial sums where the experts are also split over other axes.
    """
    chips = size("expert")
    if chips == 1:
        return serve(x, chosen, weights)
    (n, d), k, here = x.shape, chosen.shape[1], experts // chips
    # As one array of float32, which has gradients and is exact for any number of experts.
    routes = all_gather(jnp.concatenate([chosen.astype(jnp.float32), weights], axis=1), "expert", 0)
    everywhere, weights = routes[:, :k].astype(jnp.int32), routes[:, k:]
    local = everywhere - index("expert") * here
    local = jnp.where((local >= 0) & (local < here), local, here)
    exchange = exchanges(n, d, x.dtype.itemsize, chips, experts=experts, top_k=k)
    if exchange or k > here:
        local, weights = (part[:, :here] for part in jax.lax.sort((local, weights), dimension=1, num_keys=1))
    if not exchange:
        return reduce_scatter(serve(all_gather(x, "expert", 0), local, weights), "expert", 0)

    plan = _Plan.of(everywhere.reshape(chips, n, k) // here, n)
    comes = _listed(jnp.any(local < here, axis=1))
    slots = local.shape[1]
    served = serve(
        plan.there(jnp.take(_cells(x), plan.sent % n, axis=0, mode="clip")),
        # Sorted behind the rows that came are those that did not: their experts are none.
        jnp.take(local, comes, axis=0, mode="clip"),
        jnp.take(weights, comes, axis=0, mode="clip"),
        count=jnp.sum(plan.arrive),
        window=min(max(math.ceil(WINDOW * n * k), LEAST_WINDOW, slots), chips * n * slots),
    )
    return plan.sum(plan.back(served), chosen // here).reshape(n, d)


def _cells(x: jax.Array) -> jax.Array:
    """`x [N, d]` as `[N, a, b]`, whose rows are whole tiles of a TPU; rows of a matrix move at half the speed."""
    n, d = x.shape
    rows = 32 // x.dtype.itemsize
    if d % 128:
        return x
    return x.reshape(n, rows, -1) if d % (rows * 128) == 0 else x.reshape(n, -1, 128)


def _listed(which: jax.Array) -> jax.Array:
    """Places of what is true, in order, and behind them of what is not."""
    return jnp.argsort(~which, stable=True)


def _before(counts: jax.Array) -> jax.Array:
    """Where each part begins, when they lie one after the other: `[p, ...]`, along the first axis."""
    p = counts.shape[0]
    earlier = jnp.arange(p)[:, None] > jnp.arange(p)
    return jnp.sum(jnp.where(earlier.reshape(p, p, *[1] * (counts.ndim - 1)), counts, 0), axis=1)


@dataclass(frozen=True)
class _Plan:
    """How the rows of `chips` times `n` tokens travel, from the point of view of this chip.

    Rows on the way lie without gaps, those for (or from) chip 0 first. A token goes at most once to a chip, and to
    at most k: buffers of `min(k, chips) * n` rows where they start, of `chips * n` where they arrive.

    n: tokens a chip. sent: int32 `[min(k, chips) * n]`, chip * n + token of each row that leaves.
    goes: bool `[chips, n]`; place: int32 `[chips, n]`, in the buffer of what leaves.
    leave, arrive: int32 `[chips]`, rows for and from each chip.
    landing, returning: int32 `[chips]`, where on each chip the rows from this one begin: those that I send there,
      and those that I send back.
    """

    n: int
    sent: jax.Array
    goes: jax.Array
    place: jax.Array
    leave: jax.Array
    arrive: jax.Array
    landing: jax.Array
    returning: jax.Array

    @staticmethod
    def of(owners: jax.Array, n: int) -> _Plan:
        """owners: int32 `[chips, n, k]`, the chips of all tokens' experts."""
        chips, _, k = owners.shape
        me = index("expert")
        counts = jnp.sum(jnp.any(owners[..., None] == jnp.arange(chips), axis=2), axis=1, dtype=jnp.int32)
        mine = jax.lax.dynamic_index_in_dim(owners, me, keepdims=False)
        goes = jnp.any(mine == jnp.arange(chips)[:, None, None], axis=2)
        flat = goes.reshape(-1)
        column = jax.lax.dynamic_index_in_dim(counts, me, axis=1, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(counts, me, axis=0, keepdims=False)
        return _Plan(
            n=n,
            sent=_listed(flat)[: min(k, chips) * n],
            goes=goes,
            place=(jnp.cumsum(flat, dtype=jnp.int32) - 1).reshape(chips, n),
            leave=row,
            arrive=column,
            landing=jax.lax.dynamic_index_in_dim(_before(counts), me, keepdims=False),
            returning=jax.lax.dynamic_index_in_dim(_before(counts.T), me, keepdims=False),
        )

    def there(self, rows: jax.Array) -> jax.Array:
        """`[min(k, chips) * n, ...]` as they leave -> `[chips * n, ...]` as they arrive."""
        room = self.goes.shape[0] * self.n
        return _moved(rows, room, self.n, self.leave, self.arrive, self.landing)

    def back(self, rows: jax.Array) -> jax.Array:
        """The inverse of `there`."""
        return _moved(rows, self.sent.shape[0], self.n, self.arrive, self.leave, self.returning)

    def sum(self, rows: jax.Array, owners: jax.Array) -> jax.Array:
        """float32 `[n, ...]`: the sums over each token's rows, as they left. owners: int32 `[n, k]`."""
        place, goes = self.place.T, self.goes.T
        k = owners.shape[1]
        if k < place.shape[1]:
            earlier = jnp.arange(k)[:, None] > jnp.arange(k)
            goes = ~jnp.any((owners[:, :, None] == owners[:, None, :]) & earlier, axis=2)
            place = jnp.take_along_axis(place, owners, axis=1)
        total = jnp.zeros((place.shape[0], *rows.shape[1:]), jnp.float32)
        for j in range(place.shape[1]):
            mine = goes[:, j].reshape(-1, *[1] * (rows.ndim - 1))
            total = total + jnp.where(mine, jnp.take(rows, place[:, j], axis=0, mode="clip"), 0)
        return total


def _moved(rows, room: int, most: int, leave, arrive, landing) -> jax.Array:
    """`leave[i]` rows to chip i, where they begin at `landing[i]`; at most `most` between two chips."""
    return jax.lax.platform_dependent(
        rows,
        leave,
        arrive,
        landing,
        tpu=partial(_ragged, room=room),
        default=partial(_dense, room=room, most=most),
    )


def _ragged(rows, leave, arrive, landing, *, room: int) -> jax.Array:
    out = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, out, _before(leave), leave, landing, arrive, axis_name="expert")


def _dense(rows, leave, arrive, landing, *, room: int, most: int) -> jax.Array:
    del landing
    chips = leave.shape[0]
    parts = (_before(leave)[:, None] + jnp.arange(most)).reshape(-1)
    came = all_to_all(jnp.take(rows, parts, axis=0, mode="clip"), "expert", 0, 0)
    slot, starts = jnp.arange(room), _before(arrive)
    source = jnp.minimum(jnp.sum(slot[:, None] >= starts + arrive, axis=1), chips - 1)
    within = jnp.clip(slot - jnp.take(starts, source), 0, most - 1)
    return jnp.take(came, source * most + within, axis=0)
