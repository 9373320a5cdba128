"""Which key a query sees: the rules shared by the attention ops.

A key has a position: its index, or, in a ring cache, the position that its slot holds. Query t of row b has the
position q_offset[b] + t. With `ancestors`, the last T keys are a tree of drafted tokens: the token stored at
q_offset[b] + t is t's node, and its logical position, which windows and ALiBi measure by, is q_offset[b] plus its
depth, the number of its ancestors (the node itself is in its own row of the mask and does not count). For a chain
the two positions are the same.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_offset", "lengths", "q_segments", "kv_segments", "blocks", "ancestors"],
    meta_fields=["queries", "keys", "causal", "left", "right"],
)
@dataclass(frozen=True)
class Rules:
    """What hides a key from a query; a key is visible where every rule allows it.

    Axes: B rows (1 where shared), N query heads (1 where shared), T queries, S keys.
    """

    queries: int
    keys: int
    causal: bool
    left: int | None  # keys before the query's position that it sees; None: all
    right: int | None
    q_offset: jax.Array  # int32 [B | 1]
    lengths: jax.Array | None = None  # int32 [B]: keys at positions of lengths[b] and beyond are hidden
    q_segments: jax.Array | None = None  # int32 [B, T]
    kv_segments: jax.Array | None = None  # int32 [B, S]
    blocks: jax.Array | None = None  # bool [N | 1, nq, nk]
    ancestors: jax.Array | None = None  # bool [B | 1, T, T]


def _depths(rules: Rules) -> jax.Array:
    assert rules.ancestors is not None
    return jnp.maximum(jnp.sum(rules.ancestors, axis=-1, dtype=jnp.int32) - 1, 0)


def query_positions(rules: Rules, t: jax.Array) -> jax.Array:
    """Logical positions int32 [B | 1, q] of the queries t [q]."""
    offset = rules.q_offset[:, None]
    return offset + (t if rules.ancestors is None else _depths(rules)[:, t])


def key_positions(rules: Rules, positions: jax.Array) -> jax.Array:
    """Logical positions int32 [B | 1, k] of the keys stored at `positions` [B | 1, k]."""
    if rules.ancestors is None:
        return positions
    node, inside = _nodes(rules, positions)
    depths = _depths(rules)
    rows = max(node.shape[0], depths.shape[0])
    depth = jnp.take_along_axis(
        jnp.broadcast_to(depths, (rows, rules.queries)), jnp.broadcast_to(node, (rows, node.shape[1])), axis=1
    )
    return jnp.where(inside, rules.q_offset[:, None] + depth, positions)


def _nodes(rules: Rules, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tree node stored at each key, and whether there is one; both [B | 1, k]."""
    node = positions - rules.q_offset[:, None]
    return jnp.clip(node, 0, rules.queries - 1), (node >= 0) & (node < rules.queries)


def distances(rules: Rules, t: jax.Array, positions: jax.Array) -> jax.Array:
    """Logical key position minus query position, int32 [B | 1, q, k]."""
    return key_positions(rules, positions)[:, None, :] - query_positions(rules, t)[:, :, None]


def visible(rules: Rules, t: jax.Array, s: jax.Array, positions: jax.Array | None = None) -> jax.Array | None:
    """Whether queries t [q] see keys s [k]: bool [B | 1, N | 1, q, k], or None where every query sees every key.

    positions: int32 [B | 1, k], the positions that the slots s hold (negative: none); s itself by default.
    """
    parts = []
    if positions is None:
        positions = s[None]
    else:
        parts.append((positions >= 0)[:, None, None, :])
    if rules.lengths is not None:
        parts.append((positions < rules.lengths[:, None])[:, None, None, :])
    distance = distances(rules, t, positions)
    if rules.ancestors is not None:
        node, inside = _nodes(rules, positions)
        rows = max(node.shape[0], rules.ancestors.shape[0])
        shape = (rows, t.shape[0])
        tree = jnp.take_along_axis(
            jnp.broadcast_to(rules.ancestors[:, t], (*shape, rules.queries)),
            jnp.broadcast_to(node[:, None], (*shape, node.shape[1])),
            axis=2,
        )
        older = distance <= 0 if rules.causal else True
        parts.append(jnp.where(inside[:, None], tree, older)[:, None])
    elif rules.causal:
        parts.append((distance <= 0)[:, None])
    if rules.left is not None:
        parts.append((distance >= -rules.left)[:, None])
    if rules.right is not None:
        parts.append((distance <= rules.right)[:, None])
    if rules.q_segments is not None:
        assert rules.kv_segments is not None
        parts.append((rules.q_segments[:, t][:, :, None] == rules.kv_segments[:, s][:, None, :])[:, None])
    if rules.blocks is not None:
        q_cell, k_cell = cell_sizes(rules)
        parts.append(rules.blocks[:, t // q_cell][:, :, s // k_cell][None])
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return jnp.broadcast_to(seen, (*seen.shape[:2], t.shape[0], s.shape[0]))


def take(rules: Rules, row: Any, rows: int, head: Any, heads: int) -> Rules:
    """The rules of some rows and query heads."""

    def part(x: jax.Array | None, start: Any, size: int) -> jax.Array | None:
        if x is None or x.shape[0] == 1 or x.shape[0] == size:
            return x
        return jax.lax.dynamic_slice_in_dim(x, start, size, 0)

    return replace(
        rules,
        q_offset=part(rules.q_offset, row, rows),
        lengths=part(rules.lengths, row, rows),
        q_segments=part(rules.q_segments, row, rows),
        kv_segments=part(rules.kv_segments, row, rows),
        ancestors=part(rules.ancestors, row, rows),
        blocks=part(rules.blocks, head, heads),
    )


def cell_sizes(rules: Rules) -> tuple[int, int]:
    """Queries and keys that one cell of the block mask covers."""
    assert rules.blocks is not None
    return -(-rules.queries // rules.blocks.shape[1]), -(-rules.keys // rules.blocks.shape[2])


def live_blocks(rules: Rules, q_starts: jax.Array, q_size: int, k_starts: jax.Array, k_size: int) -> jax.Array:
    """Whether any query of a block may see any key of a block: bool [nq, nk]; false is certain, true is not.

    q_starts [nq], k_starts [nk]: the first query and key of each block.
    """
    k_first, k_last = k_starts[None, None, :], k_starts[None, None, :] + (k_size - 1)
    t = q_starts[:, None] + jnp.arange(q_size)
    position = query_positions(rules, t.reshape(-1)).reshape(-1, *t.shape)
    q_low, q_high = position.min(-1)[:, :, None], position.max(-1)[:, :, None]
    live = jnp.ones((1, q_starts.shape[0], k_starts.shape[0]), bool)
    if rules.causal:
        live &= k_first <= q_high
    if rules.left is not None:
        live &= k_last >= q_low - rules.left
    if rules.right is not None:
        live &= k_first <= q_high + rules.right
    if rules.ancestors is not None:
        offset = rules.q_offset[:, None, None]
        live |= (k_last >= offset) & (k_first < offset + rules.queries)
    if rules.lengths is not None:
        live &= k_first < rules.lengths[:, None, None]
    if rules.q_segments is not None:
        assert rules.kv_segments is not None
        q_ids = rules.q_segments[:, t]
        k_ids = rules.kv_segments[:, k_starts[:, None] + jnp.arange(k_size)]
        live &= q_ids.min(-1)[:, :, None] <= k_ids.max(-1)[:, None, :]
        live &= k_ids.min(-1)[:, None, :] <= q_ids.max(-1)[:, :, None]
    live = live.any(0)
    if rules.blocks is not None:
        q_cell, k_cell = cell_sizes(rules)
        cells = rules.blocks.any(0).astype(jnp.float32)
        rows = _covered(q_starts, q_size, q_cell, cells.shape[0])
        columns = _covered(k_starts, k_size, k_cell, cells.shape[1])
        live &= (rows @ cells @ columns.T) > 0
    return live


def _covered(starts: jax.Array, size: int, cell: int, cells: int) -> jax.Array:
    """float32 [blocks, cells]: 1 where a block and a cell overlap."""
    index = jnp.arange(cells)
    return (((starts // cell)[:, None] <= index) & (index <= ((starts + size - 1) // cell)[:, None])).astype(
        jnp.float32
    )


def ring_positions(lengths: jax.Array, slots: int, s: jax.Array) -> jax.Array:
    """The position that slot s of a ring of `slots` holds: the largest one below lengths[b] that is s modulo slots.

    lengths: int32 [B]; s: int32 [k]; returns int32 [B, k], negative where the slot is unused.
    """
    last = lengths[:, None] - 1
    return last - jnp.mod(last - s, slots)
