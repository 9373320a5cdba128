"""Stacks of layers, put together on their devices: the host never has a whole one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sharding.layouts import row_major

_EACH = PartitionSpec("device")


class Stacks:
    """A stack of `layers` entries on each of some devices, all of one shape, filled entry by entry.

    One program writes to all of them at once, so that it is compiled once.
    """

    def __init__(self, devices: Sequence[Any], layers: int):
        self._mesh = Mesh(np.array(devices), ("device",))
        self._layers = layers
        self._stacks: jax.Array | None = None

    def write(self, at: int, entries: Sequence[jax.Array]) -> None:
        """Puts an entry `[1, ...]` on each device in its place, and waits until it is there."""
        shape, dtype = entries[0].shape[1:], entries[0].dtype
        n = len(entries)
        given = jax.make_array_from_single_device_arrays((n, *shape), NamedSharding(self._mesh, _EACH), [*entries])
        if self._stacks is None:
            self._stacks = _zeros(self._mesh, (n * self._layers, *shape), dtype)()
        self._stacks = writer(self._mesh, len(shape) + 1)(self._stacks, given, np.int32(at))
        jax.block_until_ready(self._stacks)

    def parts(self) -> dict[Any, jax.Array]:
        """What is on each device."""
        assert self._stacks is not None
        return {shard.device: shard.data for shard in self._stacks.addressable_shards}


def on_device(values: np.ndarray | jax.Array, device: Any) -> jax.Array:
    """The values on a device, lying as weights do there."""
    where = SingleDeviceSharding(device)
    return jax.device_put(values, row_major(values.ndim, where) if device.platform == "tpu" else where)


def _format(mesh: Mesh, ndim: int) -> Any:
    where = NamedSharding(mesh, _EACH)
    return row_major(ndim, where) if mesh.devices.flat[0].platform == "tpu" else where


@functools.cache
def _zeros(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=_format(mesh, len(shape)))


@functools.cache
def writer(mesh: Mesh, ndim: int) -> Callable[..., jax.Array]:
    """`(stacks, entries, at)` to the stacks with each device's entries from `at` on in its own, in place."""

    def write(stacks: jax.Array, entries: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stacks, entries, at, axis=0)

    each = jax.shard_map(
        write, mesh=mesh, in_specs=(_EACH, _EACH, PartitionSpec()), out_specs=_EACH, check_vma=False
    )
    return jax.jit(each, donate_argnums=0, out_shardings=_format(mesh, ndim))
