"""Rows through the experts that serve them, and the sums of what the experts make of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""From rows `[M, d]` sorted by expert, int32 `[E]` rows an expert and int32 `[M]` the expert of each row to
`[M, d]` in the rows' dtype. Rows past the sum belong to none; what they become is not used, but must be finite."""

CHUNK = 512
"""Rows that are summed up at a time: by the static model a v5e then keeps them in VMEM, and takes a third of the
time that it takes with all at once."""


def by_rows(
    rows: jax.Array,
    local: jax.Array,
    weights: jax.Array,
    compute: Compute,
    *,
    experts: int,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The weighed sum of what its experts make of each row.

    Args:
      rows: `[R, d]`.
      local: int32 `[R, k]`, the experts of each row: 0 to `experts`-1, and `experts` where there is none. A row
        without any may hold anything.
      weights: float32 `[R, k]`.
      bias: `[experts, d]`, added to each expert's output.

    Returns:
      float32 `[R, d]`, in which the sums run.
    """
    r, k = local.shape
    owner, sizes, order = _sorted(local.reshape(-1), experts)
    y = compute(jnp.take(rows, order // k, axis=0, mode="clip"), sizes, jnp.minimum(owner, experts - 1))
    parts = jnp.argsort(order).reshape(r, k), local, weights

    def sums(parts):
        places, local, weights = parts
        return _sums(y, places, local, weights, experts, bias)

    chunks = -(-r // CHUNK)
    if chunks == 1:
        return sums(parts)
    padded = [jnp.pad(part, ((0, chunks * CHUNK - r), (0, 0))).reshape(chunks, CHUNK, k) for part in parts]
    return jax.lax.map(sums, padded).reshape(chunks * CHUNK, -1)[:r]


def in_windows(
    rows: jax.Array,
    local: jax.Array,
    weights: jax.Array,
    compute: Compute,
    *,
    experts: int,
    count: jax.Array,
    window: int,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The same for the first `count` rows, in bounded memory: as many rows at a time as have `window` pairs.

    The loop's length is data, so there is no reverse derivative.

    Args:
      rows: `[R, ...]`, with d numbers a row in any shape; replaced in place.
      local: as for `by_rows`, with a row's experts in front of those that are none.
      count: int32 scalar; these rows have an expert or more, and those behind them have none.
      window: at least k; static.

    Returns:
      As `rows`, of which those behind `count` are as they were.
    """
    (total, *cell), k = rows.shape, local.shape[1]
    chunk = min(CHUNK, total)
    held = jnp.sum(local < experts, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(held, dtype=jnp.int32)
    begins, flat = ends - held, local.reshape(-1)
    # What is to be gathered later travels with the sort: gathers of single numbers take a TPU 10 ns each.
    listed = jax.lax.sort((flat >= experts, flat, jnp.arange(total * k, dtype=jnp.int32) // k), num_keys=1)
    owners, takers = (jnp.pad(part, (0, window)) for part in listed[1:])

    def one(state):
        first, rows = state
        begin = begins[first]
        last = jnp.minimum(jnp.sum(ends <= begin + window, dtype=jnp.int32), count)
        owner, taker = (jax.lax.dynamic_slice_in_dim(part, begin, window) for part in (owners, takers))
        real = begin + jnp.arange(window) < ends[last - 1]
        owner, sizes, order, taker = _sorted(jnp.where(real, owner, experts), experts, taker)
        x = jnp.take(rows, taker, axis=0, mode="clip").reshape(window, -1)
        y = compute(x, sizes, jnp.minimum(owner, experts - 1))
        places = jnp.argsort(order)

        def sums(i, rows):
            # The last chunk is moved up to where it fits; what it writes once more is the same.
            start = jnp.minimum(first + i * chunk, total - chunk)
            row = start + jnp.arange(chunk)
            at, own, share = (jax.lax.dynamic_slice_in_dim(p, start, chunk) for p in (begins, local, weights))
            place = jnp.take(places, at[:, None] - begin + jnp.arange(k), mode="clip")
            new = _sums(y, place, own, share, experts, bias).astype(rows.dtype).reshape(chunk, *cell)
            mine = ((row >= first) & (row < last)).reshape(chunk, *[1] * len(cell))
            new = jnp.where(mine, new, jax.lax.dynamic_slice_in_dim(rows, start, chunk))
            return jax.lax.dynamic_update_slice_in_dim(rows, new, start, 0)

        return last, jax.lax.fori_loop(0, -(-(last - first) // chunk), sums, rows)

    return jax.lax.while_loop(lambda state: state[0] < count, one, (jnp.int32(0), rows))[1]


def by_pairs(
    rows: jax.Array,
    token: jax.Array,
    owner: jax.Array,
    weights: jax.Array,
    compute: Compute,
    *,
    experts: int,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The same from a list of pairs, where a row may have any number of experts.

    Args:
      rows: `[R, d]`.
      token: int32 `[P]`, the row of each pair; owner: int32 `[P]`, its expert, `experts` where the pair is none.
      weights: float32 `[P]`.

    Returns:
      float32 `[R, d]`.
    """
    owner, sizes, _, token, weights = _sorted(owner, experts, token, weights)
    real, owner = owner < experts, jnp.minimum(owner, experts - 1)
    y = compute(jnp.take(rows, token, axis=0, mode="clip"), sizes, owner).astype(jnp.float32)
    if bias is not None:
        y = y + jnp.take(bias, owner, axis=0).astype(jnp.float32)
    y = jnp.where(real[:, None], y * weights[:, None], 0)
    return jnp.zeros(rows.shape, jnp.float32).at[jnp.where(real, token, rows.shape[0])].add(y, mode="drop")


def _sorted(owner: jax.Array, experts: int, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Pairs by expert, those of none last: the sorted owners, how many each expert has, the order, the others."""
    order = jnp.arange(owner.shape[0], dtype=jnp.int32)
    owner, *carried = jax.lax.sort((owner, order, *others), num_keys=1)
    # By comparisons: a TPU takes ten times as long for a scatter of single numbers.
    sizes = jnp.sum(owner[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return owner, sizes, *carried


def _sums(y, places, local, weights, experts: int, bias) -> jax.Array:
    """float32 `[R, d]`: `weights [R, k]` times the rows of `y` at `places [R, k]`, where there is an expert."""
    weights = jnp.where(local < experts, weights, 0)
    total = jnp.zeros((places.shape[0], y.shape[1]), jnp.float32)
    for j in range(places.shape[1]):
        part = jnp.take(y, places[:, j], axis=0, mode="clip").astype(jnp.float32)
        total = total + part * weights[:, j, None]
    if bias is not None:
        shares = jnp.sum(jnp.where(local[:, :, None] == jnp.arange(experts), weights[:, :, None], 0), axis=1)
        total = total + jnp.dot(shares, bias.astype(jnp.float32), precision="highest")
    return total
