"""Parameters that orbax keeps, to the devices of a mesh: orbax reads each process's parts itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinf.checkpoint.orbax import OrbaxTensors
from jaxinf.checkpoint.stacks import Stacks, on_device
from jaxinf.checkpoint.streaming import Progress, Wanted, assembled, parts_of, total_bytes
from pallas_kernels.errors import CheckpointError
from sharding.placement import Dim

_GROUP = 1 << 30
"""Bytes of all parts together that orbax is asked for at once; its own overhead a call is tens of milliseconds."""


def restore_all(
    tensors: OrbaxTensors, wanted: Sequence[Wanted], mesh: Mesh, progress: Progress | None = None
) -> Iterator[jax.Array]:
    """As `streaming.place_all`. What is padded or repeated is cut on its devices out of what orbax brought there.

    Raises:
      CheckpointError: orbax cannot read them, or a value is NaN or infinite.
    """
    total, done = sum(total_bytes(one.placed, mesh) for one in wanted), 0
    arrays = _restored(tensors, wanted, mesh)
    for one in wanted:
        placed = one.placed
        where = parts_of(placed, mesh)
        stages = _stages(one, mesh)
        stacks = Stacks(list(where), len(stages)) if one.stacked else None
        parts: dict[Any, jax.Array] = {}
        for i, starts in enumerate(stages):
            for start in starts:
                for shard in next(arrays).addressable_shards:
                    if not one.stacked or where[shard.device][0][0] + i == start:
                        parts[shard.device] = on_device(shard.data, shard.device)
            if stacks is not None:
                stacks.write(i, [parts[device] for device in where])
        if stacks is not None:
            parts = stacks.parts()
        done += total_bytes(placed, mesh)
        if progress is not None:
            progress(done, total)
        yield assembled(placed, mesh, parts)


def _stages(one: Wanted, mesh: Mesh) -> list[list[int]]:
    """Which layers are written at the same time: the first of every stage, then the second, ..."""
    if not one.stacked:
        return [[0]]
    stages = mesh.shape["pipeline"] if one.placed.partition[0] == "pipeline" else 1
    each = len(one.names) // stages
    return [[stage * each + i for stage in range(stages)] for i in range(each)]


def _restored(tensors: OrbaxTensors, wanted: Sequence[Wanted], mesh: Mesh) -> Iterator[jax.Array]:
    """Every stored tensor as placed arrays have it, in the order in which they are used; a layer as `[1, ...]`."""
    order = [(one, one.names[i]) for one in wanted for layers in _stages(one, mesh) for i in layers]
    for group in _groups(tensors, order):
        found = tensors.restore({name: (one.placed.dtype, _stored(one, mesh)) for one, name in group})
        good = jax.device_get(_finite(found))
        for one, name in group:
            if not good[name]:
                raise CheckpointError(
                    f"tensor {name} holds values that are NaN or infinite in {one.placed.dtype}; the checkpoint is "
                    "damaged, or needs a wider dtype"
                )
            yield _cut(one, mesh)(found.pop(name))


def _groups(tensors: OrbaxTensors, order: list[tuple[Wanted, str]]) -> Iterator[list[tuple[Wanted, str]]]:
    group, size = [], 0
    for one, name in order:
        if group and size + tensors[name].nbytes > _GROUP:
            yield group
            group, size = [], 0
        group.append((one, name))
        size += tensors[name].nbytes
    yield group


def _layer(one: Wanted) -> tuple[tuple[Dim, ...], PartitionSpec]:
    """Dimensions and partition of one layer of the array."""
    dims, partition = one.placed.dims, one.placed.partition
    return (dims[1:], PartitionSpec(*partition[1:])) if one.stacked else (dims, partition)


def _stored(one: Wanted, mesh: Mesh) -> NamedSharding:
    """How orbax is to place it: whole along what is padded or repeated."""
    dims, axes = _layer(one)
    split = (axis if dim.placed == dim.size else None for dim, axis in zip(dims, axes, strict=True))
    return NamedSharding(mesh, PartitionSpec(*split))


def _cut(one: Wanted, mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    dims, axes = _layer(one)
    if not one.stacked and all(dim.placed == dim.size for dim in dims):
        return lambda array: array
    axes = PartitionSpec(None, *axes) if one.stacked else axes
    return _cutter(dims, one.stacked, NamedSharding(mesh, axes))


@functools.cache
def _cutter(dims: tuple[Dim, ...], stacked: bool, where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """From an array as the model knows it to the placed one, or to a layer of it."""

    def cut(values: jax.Array) -> jax.Array:
        for axis, dim in enumerate(dims):
            _, which, zeros = dim.source(0, dim.placed)
            if which is not None:
                values = jnp.take(values, which, axis=axis)
            if zeros:
                values = jnp.pad(values, [(0, zeros if i == axis else 0) for i in range(values.ndim)])
        return values[None] if stacked else values

    return jax.jit(cut, out_shardings=where)


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.isfinite(array)) for name, array in arrays.items()}
