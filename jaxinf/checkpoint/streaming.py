"""Parameters from files to the devices of a mesh, part by part: no large array is whole on the host."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinf.checkpoint.stacks import Stacks, on_device
from sharding.placement import Index, Placed, Read

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
_WORKERS = 8
_WHOLE = 32 << 20
"""Bytes of a part of a stack of layers up to which it is not sent layer by layer."""


@dataclass(frozen=True)
class Wanted:
    """An array to be placed.

    read: reads the model's own values of it. names: of its parameter, or where it is `stacked` of each layer's.
    """

    placed: Placed
    read: Read
    names: tuple[str, ...]
    stacked: bool


@dataclass(frozen=True)
class _Piece:
    """What is read at once: `index` of the placed array, for `devices`."""

    wanted: Wanted
    index: Index
    devices: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(s.stop - s.start for s in self.index) * self.wanted.placed.dtype.itemsize

    def gather(self) -> np.ndarray:
        return self.wanted.placed.take(self.wanted.read, self.index)


def place_all(wanted: Sequence[Wanted], mesh: Mesh, progress: Progress | None = None) -> Iterator[jax.Array]:
    """The arrays on the mesh, in order. Each process reads what its own devices hold, and that once.

    The host holds a few pieces at a time, as many bytes as the largest of them; on accelerators large stacks of
    layers are put together on their devices, of which the host has one layer.

    Args:
      progress: called after each piece with the bytes that this process has placed and those that it will.
    """
    rounds = [_rounds(one, mesh) for one in wanted]
    pieces = [piece for some in rounds for together in some for piece in together]
    total, done = sum(piece.nbytes for piece in pieces), 0
    hosts = _prefetched(pieces)
    for one, some in zip(wanted, rounds, strict=True):
        devices = list(parts_of(one.placed, mesh))
        stacks = Stacks(devices, len(some)) if len(some) > 1 else None
        parts: dict[Any, jax.Array] = {}
        for i, together in enumerate(some):
            for piece in together:
                host = next(hosts)
                parts.update({device: on_device(host, device) for device in piece.devices})
                jax.block_until_ready([parts[device] for device in piece.devices])
                del host
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
            if stacks is not None:
                stacks.write(i, [parts[device] for device in devices])
        if stacks is not None:
            parts = stacks.parts()
        yield assembled(one.placed, mesh, parts)


def parts_of(placed: Placed, mesh: Mesh) -> dict[Any, tuple[tuple[int, int], ...]]:
    """The part of a placed array that each device of this process holds: `(start, stop)` of each dimension."""
    found = {}
    for device, index in placed.sharding(mesh).addressable_devices_indices_map(placed.shape).items():
        assert index is not None
        found[device] = tuple(s.indices(n)[:2] for s, n in zip(index, placed.shape, strict=True))
    return found


def total_bytes(placed: Placed, mesh: Mesh) -> int:
    """Bytes of the array that this process's devices hold, what several of them hold counted once."""
    parts = set(parts_of(placed, mesh).values())
    return sum(math.prod(stop - start for start, stop in part) for part in parts) * placed.dtype.itemsize


def assembled(placed: Placed, mesh: Mesh, parts: dict[Any, jax.Array]) -> jax.Array:
    """The array on the mesh, of this process's parts."""
    here = [parts[device] for device in parts_of(placed, mesh)]
    return jax.make_array_from_single_device_arrays(placed.shape, placed.sharding(mesh), here)


def _rounds(wanted: Wanted, mesh: Mesh) -> list[list[_Piece]]:
    """The pieces of an array. With several rounds, each has one layer for every device."""
    alike: dict[Any, list[tuple[Any, Index]]] = {}
    for device, part in parts_of(wanted.placed, mesh).items():
        index = tuple(slice(*at) for at in part)
        alike.setdefault(wanted.placed.content(index), []).append((device, index))
    whole = [_Piece(wanted, some[0][1], tuple(device for device, _ in some)) for some in alike.values()]
    layers = whole[0].index[0].stop - whole[0].index[0].start if wanted.stacked else 1
    if layers == 1 or not _by_layer(sum(piece.nbytes for piece in whole), mesh):
        return [whole]

    def layer(piece: _Piece, i: int) -> _Piece:
        first, *rest = piece.index
        return _Piece(wanted, (slice(first.start + i, first.start + i + 1), *rest), piece.devices)

    return [[layer(piece, i) for piece in whole] for i in range(layers)]


def _by_layer(nbytes: int, mesh: Mesh) -> bool:
    """Whether a stack of layers of so many bytes is put together on its devices."""
    return mesh.devices.flat[0].platform != "cpu" and nbytes > _WHOLE  # a CPU takes the host's memory over instead


def _prefetched(pieces: Sequence[_Piece]) -> Iterator[np.ndarray]:
    """What the pieces hold, in order, read by a few threads while earlier ones are sent."""
    budget = max((p.nbytes for p in pieces), default=0)
    waiting = collections.deque(pieces)
    under_way: collections.deque[tuple[int, Future[np.ndarray]]] = collections.deque()
    held = 0
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1), "reading") as pool:
        try:
            while waiting or under_way:
                while waiting and (not under_way or held + waiting[0].nbytes <= budget):
                    piece = waiting.popleft()
                    held += piece.nbytes
                    under_way.append((piece.nbytes, pool.submit(piece.gather)))
                size, reading = under_way.popleft()
                yield reading.result()
                del reading
                held -= size
        finally:
            for _, reading in under_way:
                reading.cancel()
