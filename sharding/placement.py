"""How an array lies on a mesh: which chip holds which part, padded or repeated where it must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.layouts import row_major

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
"""From an index into an array, of slices without steps, to those values."""


@dataclass(frozen=True)
class Dim:
    """One dimension of an array, as the model knows it and as it lies on a mesh.

    Attributes:
      size: entries that the model knows.
      padding: zeros behind them.
      block, times: blocks of so many entries (a head's channels) that lie so many times each, one after the other.
    """

    size: int
    padding: int = 0
    block: int = 1
    times: int = 1

    @property
    def placed(self) -> int:
        """Entries on the mesh."""
        return self.size * self.times + self.padding

    def source(self, start: int, stop: int) -> tuple[slice, np.ndarray | None, int]:
        """Where the placed entries `start:stop` come from.

        Returns:
          `(a slice of the model's own entries, which of those to take or None for all, zeros behind them)`.
        """
        if self.times == 1:
            end = min(stop, self.size)
            return slice(min(start, end), end), None, stop - max(end, start)
        first, last = (at // self.block // self.times for at in (start, stop - 1))
        at = np.arange(start, stop)
        own = at // self.block // self.times * self.block + at % self.block
        low, high = first * self.block, (last + 1) * self.block
        if stop - start <= self.block and start // self.block == (stop - 1) // self.block:
            return slice(int(own[0]), int(own[-1]) + 1), None, 0
        return slice(low, high), own - low, 0

    def own(self) -> np.ndarray | slice:
        """Which placed entries are the model's own, each once and in order."""
        if self.times == 1:
            return slice(0, self.size)
        at = np.arange(self.size)
        return at // self.block * self.block * self.times + at % self.block


@dataclass(frozen=True)
class Placed:
    """How one array lies on a mesh.

    Attributes:
      path: its place in the pytree.
      dtype: of its values.
      dims: its dimensions.
      partition: which mesh axes split which dimension of the placed array.
    """

    path: tuple[Any, ...]
    dtype: np.dtype
    dims: tuple[Dim, ...]
    partition: PartitionSpec

    @property
    def own_shape(self) -> tuple[int, ...]:
        """As the model knows it."""
        return tuple(dim.size for dim in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it lies on the mesh, all chips together."""
        return tuple(dim.placed for dim in self.dims)

    @property
    def plain(self) -> bool:
        """Whether nothing is padded or repeated."""
        return self.shape == self.own_shape

    def sharding(self, mesh: Mesh) -> NamedSharding:
        return NamedSharding(mesh, self.partition)

    def format(self, mesh: Mesh) -> Format | NamedSharding:
        """The sharding, and on TPUs the row-major layout that weights have there."""
        where = self.sharding(mesh)
        return row_major(len(self.dims), where) if mesh.devices.flat[0].platform == "tpu" else where

    def abstract(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """Stands for the placed array where a program is compiled ahead of time."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.format(mesh))

    def content(self, index: Sequence[slice]) -> tuple[Any, ...]:
        """Equal for parts of the placed array that hold the same of the model's own."""
        bounds = [part.indices(n)[:2] for part, n in zip(index, self.shape, strict=True)]
        sources = [dim.source(*at) for dim, at in zip(self.dims, bounds, strict=True)]
        return tuple((o.start, o.stop, None if which is None else which.tobytes(), n) for o, which, n in sources)

    def take(self, read: Read, index: Sequence[slice]) -> np.ndarray:
        """Values of the placed array at `index`, where `read` gives those of the model's own."""
        bounds = [part.indices(n)[:2] for part, n in zip(index, self.shape, strict=True)]
        sources = [dim.source(*at) for dim, at in zip(self.dims, bounds, strict=True)]
        values = read(tuple(own for own, _, _ in sources))
        for axis, (_, which, zeros) in enumerate(sources):
            if which is not None:
                values = np.take(values, which, axis=axis)
            if zeros:
                widths = [(0, zeros if i == axis else 0) for i in range(values.ndim)]
                values = np.pad(values, widths)
        return values

    def put(self, read: Read, mesh: Mesh) -> jax.Array:
        """The array on the mesh; `read` is asked once for each part that this process's devices hold."""
        parts: dict[tuple[Any, ...], np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            key = self.content(index)
            if key not in parts:
                parts[key] = self.take(read, index)
            return parts[key]

        return jax.make_array_from_callback(self.shape, self.format(mesh), part, dtype=self.dtype)

    def place(self, value: jax.Array | np.ndarray, mesh: Mesh) -> jax.Array:
        """The whole array `value`, which every process has, on the mesh."""
        if tuple(value.shape) != self.own_shape:
            raise AssertionError(f"{self.path} has shape {list(value.shape)}, not {list(self.own_shape)}")
        here = all(device.process_index == jax.process_index() for device in mesh.devices.flat)
        if self.plain and here:
            return jax.device_put(value, self.format(mesh))
        host = np.asarray(value)
        return self.put(lambda index: host[index], mesh)

    def fetch(self, value: jax.Array, entry: int | None = None) -> np.ndarray:
        """The model's own array, on the host, from the placed one, of which this process must have all parts.

        entry: of the first dimension, which alone is wanted.
        """
        dims = self.dims if entry is None else self.dims[1:]
        host = np.asarray(value if entry is None else value[entry])
        for axis, dim in enumerate(dims):
            if dim.placed != dim.size:
                host = host[(slice(None),) * axis + (dim.own(),)]
        return host


def padded(size: int, ways: int) -> Dim:
    """A dimension with zeros behind it, up to a multiple of `ways`."""
    return Dim(size, padding=-size % ways)


def repeated(size: int, blocks: int, ways: int) -> Dim:
    """A dimension of equal blocks, so often each that each of `ways` chips has one: chip i has i * blocks // ways.

    With at least `ways` blocks nothing is repeated.
    """
    assert size % blocks == 0
    assert blocks % ways == 0 or ways % blocks == 0
    return Dim(size, block=size // blocks, times=math.ceil(ways / blocks))
