"""Collectives over the named axes of the mesh that a program is traced for.

Sharded programs are one `jax.shard_map` around the whole function. Inside it an axis has the mesh's size; outside
of any, or where the mesh does not have it, its size is 1 and every function here returns what it was given. So
layers are written once. The mesh in context is part of jit's key.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

AXES = ("data", "pipeline", "sequence", "expert", "tensor")
"""Every mesh has these, in this order; neighbours along `tensor` are neighbours on the wires."""


_ALONE = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What is traced inside computes as on one chip: every chip does the same with arrays that it has whole.

    For small modules beside a split model. No jitted function that asks for sizes may be called both inside and
    outside.
    """
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def size(*axes: str) -> int:
    """Chips along the axes, in the program being traced."""
    if _ALONE.get():
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    manual = getattr(mesh, "manual_axes", ())
    return math.prod(mesh.shape[axis] for axis in axes if axis in manual)


def live(*axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one chip."""
    return tuple(axis for axis in axes if size(axis) > 1)


def index(*axes: str) -> jax.Array:
    """int32 scalar: this chip's place along the axes, the last of them fastest."""
    names = live(*axes)
    return jax.lax.axis_index(names) if names else jnp.int32(0)


def psum(x, *axes: str):
    """The sum over the chips of the axes."""
    names = live(*axes)
    return jax.lax.psum(x, names) if names else x


def pmax(x, *axes: str):
    """The maximum over the chips of the axes."""
    names = live(*axes)
    return jax.lax.pmax(x, names) if names else x


def pmin(x, *axes: str):
    """The minimum over the chips of the axes."""
    names = live(*axes)
    return jax.lax.pmin(x, names) if names else x


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The chips' arrays side by side along `dim`."""
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True) if size(axis) > 1 else x


def reduce_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The sum over the axis, of which each chip keeps its part along `dim`."""
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True) if size(axis) > 1 else x


def all_to_all(x: jax.Array, axis: str, split: int, concat: int) -> jax.Array:
    """Part i along `split` goes to chip i; what arrives lies along `concat` in the order of chips."""
    return jax.lax.all_to_all(x, axis, split, concat, tiled=True) if size(axis) > 1 else x


def rotate(x, axis: str, by: int = 1):
    """What the chip `by` places before this one along the axis gave; the ends of the axis are joined."""
    chips = size(axis)
    if chips == 1 or by % chips == 0:
        return x
    pairs = [(i, (i + by) % chips) for i in range(chips)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, pairs), x)


def part(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """This chip's part along `dim` of an array that all chips of the axis have whole."""
    chips = size(axis)
    if chips == 1:
        return x
    each = x.shape[dim] // chips
    return jax.lax.dynamic_slice_in_dim(x, index(axis) * each, each, dim)
