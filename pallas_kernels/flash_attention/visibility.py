"""What a tile hides, inside the kernel: the rules of `masks.visible` for some keys and some query columns.

Keys run down the sublanes and queries along the lanes, because the kernel holds scores transposed.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Static:
    """The rules without their arrays; `cells` are the queries and keys that a cell of the block mask covers."""

    queries: int
    causal: bool
    left: int | None
    right: int | None
    segments: bool
    tree: bool
    cells: tuple[int, int] | None

    @property
    def one_range(self) -> bool:
        """Whether each query sees one range of keys, which its position alone decides."""
        return not (self.segments or self.tree or self.cells)


@dataclass(frozen=True)
class Tile:
    """Where a tile is, and the arrays that its rules need: n query columns, k keys."""

    keys: int
    columns: int
    span: int  # the same queries return after so many columns, with another head; a power of two
    first_key: Any
    first_query: Any
    last_query: Any
    offset: Any
    limit: Any  # keys from here on are hidden
    q_positions: Any = None  # int32 [1, n], with a tree
    q_segments: Any = None  # int32 [1, n]
    kv_segments: Any = None  # int32 [1, k]
    ancestors: Any = None  # bfloat16 [nodes, n]: 1 where the query sees the node
    depths: Any = None  # float32 [1, nodes]
    cells: Any = None  # bfloat16 [key cells, query cells]


def _keys(tile: Tile) -> jax.Array:
    return tile.first_key + jax.lax.broadcasted_iota(jnp.int32, (tile.keys, 1), 0)


def _queries(tile: Tile) -> jax.Array:
    column = jax.lax.broadcasted_iota(jnp.int32, (1, tile.columns), 1)
    return tile.first_query + (column & (tile.span - 1))


def _query_positions(tile: Tile) -> jax.Array:
    return tile.offset + _queries(tile) if tile.q_positions is None else tile.q_positions


def _key_positions(rules: Static, tile: Tile) -> jax.Array:
    if not rules.tree:
        return _keys(tile)
    node, chosen = _nodes(tile)
    depth = jnp.sum(jnp.where(chosen, tile.depths, 0.0), axis=1, keepdims=True).astype(jnp.int32)
    return jnp.where(_inside(rules, node), tile.offset + depth, _keys(tile))


def _nodes(tile: Tile) -> tuple[jax.Array, jax.Array]:
    """The tree node of each key, int32 [k, 1], and which node that is, bool [k, nodes]."""
    node = _keys(tile) - tile.offset
    return node, node == jax.lax.broadcasted_iota(jnp.int32, (tile.keys, tile.ancestors.shape[0]), 1)


def _inside(rules: Static, node: jax.Array) -> jax.Array:
    return (node >= 0) & (node < rules.queries)


def _one_hot_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def distances(rules: Static, tile: Tile) -> jax.Array:
    """Key position minus query position, int32 [k, n]."""
    return _key_positions(rules, tile) - _query_positions(tile)


def visible(rules: Static, tile: Tile) -> jax.Array:
    """bool [k, n]."""
    if rules.one_range:
        position = _query_positions(tile)
        end = _end(rules, tile, position)
        keys = jax.lax.broadcasted_iota(jnp.int32, (tile.keys, tile.columns), 0)
        seen = keys < end - tile.first_key
        if rules.left is not None:
            seen &= keys >= position - (rules.left + tile.first_key)
        return seen
    distance = distances(rules, tile)
    seen = _keys(tile) < tile.limit
    if rules.tree:
        node, chosen = _nodes(tile)
        inside = _inside(rules, node)
        # 1 where the tree shows the node, 0 where it hides it: a TPU selects between numbers, not between masks.
        shown = jnp.where(inside, _one_hot_dot(chosen.astype(jnp.float32), tile.ancestors), 1.0)
        if rules.causal:
            shown = jnp.where(inside | (distance <= 0), shown, 0.0)
        seen &= shown > 0.5
    elif rules.causal:
        seen &= distance <= 0
    if rules.left is not None:
        seen &= distance >= -rules.left
    if rules.right is not None:
        seen &= distance <= rules.right
    if rules.segments:
        ids = jnp.broadcast_to(tile.kv_segments, (128, tile.keys)).T[:, :1]
        seen &= ids == tile.q_segments
    if rules.cells is not None:
        q_size, k_size = rules.cells
        k_cells, q_cells = tile.cells.shape
        q_first = jax.lax.broadcasted_iota(jnp.int32, (q_cells, 1), 0) * q_size
        k_first = jax.lax.broadcasted_iota(jnp.int32, (1, k_cells), 1) * k_size
        t, s = _queries(tile), _keys(tile)
        of_query = ((t >= q_first) & (t < q_first + q_size)).astype(jnp.float32)
        of_key = ((s >= k_first) & (s < k_first + k_size)).astype(jnp.float32)
        seen &= _one_hot_dot(of_key, _one_hot_dot(tile.cells, of_query)) > 0.5
    return jnp.broadcast_to(seen, (tile.keys, tile.columns))


def _end(rules: Static, tile: Tile, position: Any) -> Any:
    """The key before which the range of a query at `position` ends."""
    end = tile.limit
    if rules.causal:
        end = jnp.minimum(end, position + 1)
    if rules.right is not None:
        end = jnp.minimum(end, position + (rules.right + 1))
    return end


def used_keys(rules: Static, tile: Tile, seen: jax.Array) -> jax.Array:
    """bool [1, k]: keys that some query of the tile sees. The others may hold nan, and 0 * nan is nan."""
    if rules.one_range:
        keys = tile.first_key + jax.lax.broadcasted_iota(jnp.int32, (1, tile.keys), 1)
        used = keys < _end(rules, tile, tile.offset + tile.last_query)
        if rules.left is not None:
            used &= keys >= tile.offset + tile.first_query - rules.left
        return used
    real = seen & (_queries(tile) <= tile.last_query)
    some = jnp.max(jnp.where(real, 1.0, 0.0), axis=1, keepdims=True)
    return jnp.broadcast_to(some, (tile.keys, 128)).T[:1] > 0.5
