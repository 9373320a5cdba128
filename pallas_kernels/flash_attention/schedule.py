"""Which blocks of keys each block of queries visits, and what is hidden inside them.

Blocks are cut into tiles of tile_q queries x tile_kv keys. A tile is DEAD (no query sees a key), FULL (every
query sees every key) or PARTIAL. The kernel's grid walks a list of steps, one for each pair of blocks with a live
tile, so dead blocks cost neither time nor copies. The functions take NumPy or jax.numpy as `xp`: what is known
while tracing becomes constants.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels.masks import Rules

DEAD, FULL, PARTIAL = 0, 1, 2
# A step is one int32: its query block and key block, whether it is the first and the last one of its query block,
# and what its key block is: DEAD, FULL or PARTIAL.
BITS = 13
FIRST, LAST = 1 << 26, 1 << 27
KIND = 28
MAX_BLOCKS = 1 << BITS
MAX_TILES = 16  # of a pair of blocks: two bits each in an int32


@dataclass(frozen=True)
class Grain:
    """How queries and keys are cut."""

    q: int
    kv: int
    tile_q: int
    tile_kv: int

    def counts(self, queries: int, keys: int) -> tuple[int, int]:
        return -(-queries // self.q), -(-keys // self.kv)


def tile_states(rules: Rules, grain: Grain, heads: int, xp: Any) -> Any:
    """int32 [B | 1, N / heads | 1, query tiles, key tiles]: DEAD, FULL or PARTIAL for `heads` heads together.

    FULL is certain; what is not certain is PARTIAL.
    """
    nq, nk = grain.counts(rules.queries, rules.keys)
    t_first = np.arange(nq * grain.q // grain.tile_q) * grain.tile_q
    s_first = np.arange(nk * grain.kv // grain.tile_kv) * grain.tile_kv
    t = np.minimum(t_first[:, None] + np.arange(grain.tile_q), rules.queries - 1)
    s_last = np.minimum(s_first + grain.tile_kv, rules.keys) - 1
    offset = xp.asarray(rules.q_offset)[:, None]
    if rules.ancestors is None:
        q_low, q_high = offset + t[:, 0], offset + t[:, -1]
    else:
        depth = xp.maximum(rules.ancestors.sum(-1, dtype=np.int32) - 1, 0)[:, t]
        q_low, q_high = offset + depth.min(-1), offset + depth.max(-1)
    q_low, q_high, offset = q_low[:, :, None], q_high[:, :, None], offset[:, :, None]

    live = (t_first < rules.queries)[:, None] & (s_first < rules.keys)
    full = np.broadcast_to(s_first + grain.tile_kv <= rules.keys, live.shape)
    if rules.causal:
        live = live & (s_first <= q_high)
        full = full & (s_last <= q_low)
    if rules.left is not None:
        live = live & (s_last >= q_low - rules.left)
        full = full & (s_first >= q_high - rules.left)
    if rules.right is not None:
        live = live & (s_first <= q_high + rules.right)
        full = full & (s_last <= q_low + rules.right)
    if rules.ancestors is not None:
        tree = (s_last >= offset) & (s_first < offset + rules.queries) & (t_first < rules.queries)[:, None]
        live, full = live | tree, full & ~tree
    if rules.lengths is not None:
        ends = xp.asarray(rules.lengths)[:, None, None]
        live, full = live & (s_first < ends), full & (s_last < ends)
    if rules.q_segments is not None:
        assert rules.kv_segments is not None
        s = np.minimum(s_first[:, None] + np.arange(grain.tile_kv), rules.keys - 1)
        q_ids, k_ids = rules.q_segments[:, t], rules.kv_segments[:, s]
        q_min, q_max = q_ids.min(-1)[:, :, None], q_ids.max(-1)[:, :, None]
        k_min, k_max = k_ids.min(-1)[:, None], k_ids.max(-1)[:, None]
        live = live & (q_min <= k_max) & (k_min <= q_max)
        full = full & (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
    live, full = (x if x.ndim == 3 else x[None] for x in (live, full))
    live, full = live[:, None], full[:, None]
    if rules.blocks is not None:
        cells = xp.asarray(rules.blocks)
        rows = _covers(t[:, 0], t[:, -1], rules.queries, cells.shape[1])
        columns = _covers(np.minimum(s_first, rules.keys - 1), s_last, rules.keys, cells.shape[2])
        some = rows @ cells.astype(np.float32) @ columns.T > 0
        every = rows @ (~cells).astype(np.float32) @ columns.T == 0
        if cells.shape[0] > 1:
            some = some.reshape(-1, heads, *some.shape[1:]).any(1)
            every = every.reshape(-1, heads, *every.shape[1:]).all(1)
        live, full = live & some, full & every
    return xp.where(live, xp.where(full, FULL, PARTIAL), DEAD).astype(np.int32)


def _covers(first: np.ndarray, last: np.ndarray, length: int, cells: int) -> np.ndarray:
    """float32 [tiles, cells]: 1 where a tile and a cell overlap."""
    size = -(-length // cells)
    index = np.arange(cells)
    return (((first // size)[:, None] <= index) & (index <= (last // size)[:, None])).astype(np.float32)


@dataclass(frozen=True)
class Schedule:
    steps: Any  # int32 [B | 1, H | 1, n]
    tiles: Any  # int32 [B | 1, H | 1, n], the states of the step's tiles, two bits each, query tiles first
    length: Any  # int: steps of the longest list


def schedule(states: Any, grain: Grain, xp: Any) -> Schedule:
    """The steps in order of query blocks. Every query block has one at least, so that its result is written."""
    a, b = grain.q // grain.tile_q, grain.kv // grain.tile_kv
    rows, heads, tq, tk = states.shape
    nq, nk = tq // a, tk // b
    cut = xp.moveaxis(states.reshape(rows, heads, nq, a, nk, b), 3, 4).reshape(rows, heads, nq * nk, a * b)
    shifts = 2 * np.arange(a * b, dtype=np.uint32)
    words = (cut.astype(np.uint32) << shifts).sum(-1, dtype=np.uint32)
    live, full = (cut != DEAD).any(-1), (cut == FULL).all(-1)
    kinds = xp.where(live, xp.where(full, FULL, PARTIAL), DEAD)
    alone = ~live.reshape(rows, heads, nq, nk).any(-1)
    alone = xp.repeat(alone, nk, axis=-1) & np.tile(np.arange(nk) == 0, nq)
    taken = live | alone
    counts = taken.sum(-1)
    order = xp.argsort(~taken, axis=-1, stable=True)
    length = counts.max()
    if xp is np:
        order = order[..., : int(length)]
    n = order.shape[-1]
    last = counts[..., None] - 1
    place = np.arange(n)
    order = xp.take_along_axis(order, xp.minimum(place, last), axis=-1)
    kinds, words = (xp.take_along_axis(x, order, axis=-1) for x in (kinds, words))
    kinds = xp.where(place <= last, kinds, DEAD)
    i, j = order // nk, order % nk
    # A step without work names the key block of the last step that had some, so that nothing new is copied.
    before = xp.maximum.accumulate(xp.where(kinds != DEAD, place, 0), axis=-1)
    j = xp.take_along_axis(j, before, axis=-1)
    change = i[..., 1:] != i[..., :-1]
    edge = np.ones((rows, heads, 1), bool)
    first = xp.concatenate([edge, change], -1) & (place <= last)
    final = (xp.concatenate([change, edge], -1) | (place == last)) & (place <= last)
    steps = i | j << BITS | first * FIRST | final * LAST | kinds << KIND
    return Schedule(steps.astype(np.int32), words.view(np.int32), length)


def word(states: tuple[int, ...]) -> int:
    """The tile word of those states, as a signed int32."""
    bits = sum(state << 2 * n for n, state in enumerate(states))
    return bits - (1 << 32) if bits >> 31 else bits


def tile_list(word: int, count: int) -> tuple[int, ...]:
    return tuple(word >> 2 * n & 3 for n in range(count))


def patterns(rules: Rules, grain: Grain, at_most: int = 3) -> tuple[int, ...]:
    """Tile words of partial blocks that a mask without arrays has most often, for which code is specialised."""
    made = schedule(tile_states(rules, grain, 1, np), grain, np)
    partial = made.tiles[made.steps >> KIND == PARTIAL]
    words, counts = np.unique(partial, return_counts=True)
    return tuple(int(words[n]) for n in np.argsort(-counts, stable=True)[:at_most])
