"""A function of each chip's arrays as a program over a mesh, and the arrays that go in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.collectives import AXES, all_gather
from sharding.rules import RULES

OWN = PartitionSpec(AXES)
"""State that each chip keeps for itself, of whatever shapes: outside of programs, with a first axis of one entry a
chip."""

ROWS = PartitionSpec(RULES["batch"])
"""Rows of a batch."""

SAME = PartitionSpec()
"""Equal on all chips."""

VOCAB_ROWS = PartitionSpec(RULES["batch"], RULES["vocab"])
"""`[B, V]`, both split."""

LOGITS = PartitionSpec(RULES["batch"], None, RULES["vocab"])
"""`[B, T, V]`."""


def over(mesh: Mesh, function: Callable, takes: tuple[Any, ...], gives: Any) -> Callable:
    """`function` run by every chip of the mesh on its parts of the arguments.

    takes, gives: `PartitionSpec`s of arguments and results, or trees of them that are a prefix of theirs. What is
      `OWN` has its first axis inside of programs taken off.
    """

    def run(*args):
        return _own(gives, function(*_own(takes, args, lambda x: x[0])), lambda x: x[None])

    return jax.shard_map(run, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)


def put(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Arrays of the host as arrays over the mesh. With several processes, each gives the same."""
    where = NamedSharding(mesh, spec)

    def one(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda at: host[at])

    return jax.tree.map(one, tree)


def gather_rows(tree: Any) -> Any:
    """Arrays `[B, ...]`, split by rows, whole on every chip; inside of a program."""

    def one(x: jax.Array) -> jax.Array:
        for axis in reversed(RULES["batch"]):
            x = all_gather(x, axis, 0)
        return x

    return jax.tree.map(one, tree)


def _own(specs: Any, tree: Any, change: Callable) -> Any:
    def under(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(change, part) if spec == OWN else part

    return jax.tree.map(under, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
