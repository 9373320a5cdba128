"""Parameters from files to the devices of a mesh, part by part: no array is whole on the host."""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from sharding.layouts import row_major
from sharding.placement import Index, Placed, Read

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
_WORKERS = 8
_WHOLE = 32 << 20
"""Bytes of a part of a stack of layers up to which it is not sent layer by layer."""


@dataclass(frozen=True)
class Wanted:
    """An array to be placed, and what reads the model's own values of it."""

    placed: Placed
    read: Read
    stacked: bool


@dataclass(frozen=True)
class _Piece:
    """What is read at once: `index` of the placed array, for `devices`.

    layer: `(i, n)` where it is the i-th of the n layers of their part, None where it is all of it.
    """

    wanted: Wanted
    index: Index
    devices: tuple[Any, ...]
    layer: tuple[int, int] | None

    @property
    def nbytes(self) -> int:
        return math.prod(s.stop - s.start for s in self.index) * self.wanted.placed.dtype.itemsize

    def gather(self) -> np.ndarray:
        return self.wanted.placed.take(self.wanted.read, self.index)


def place_all(wanted: Sequence[Wanted], mesh: Mesh, progress: Progress | None = None) -> Iterator[jax.Array]:
    """The arrays on the mesh, in order. Each process reads what its own devices hold, and that once.

    The host holds a few pieces at a time, as many bytes as the largest of them; on accelerators a part of a large
    stack of layers is put together on its device.

    Args:
      progress: called after each piece with the bytes that this process has placed and those that it will.
    """
    pieces = [_pieces(one, mesh) for one in wanted]
    total, done = sum(p.nbytes for some in pieces for p in some), 0
    hosts = _prefetched([p for some in pieces for p in some])
    for one, some in zip(wanted, pieces, strict=True):
        parts: dict[Any, jax.Array] = {}
        for piece in some:
            host = next(hosts)
            for device in piece.devices:
                parts[device] = _put(piece, host, device, parts.get(device))
            jax.block_until_ready([parts[device] for device in piece.devices])
            del host
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
        placed = one.placed
        here = [parts[d] for d in placed.sharding(mesh).addressable_devices_indices_map(placed.shape)]
        yield jax.make_array_from_single_device_arrays(placed.shape, placed.sharding(mesh), here)


def _pieces(wanted: Wanted, mesh: Mesh) -> list[_Piece]:
    placed = wanted.placed
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in placed.sharding(mesh).addressable_devices_indices_map(placed.shape).items():
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, placed.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, some in devices.items():
        index = tuple(slice(*at) for at in bounds)
        whole = _Piece(wanted, index, tuple(some), None)
        if not wanted.stacked or not _by_layer(whole.nbytes, some[0].platform):
            pieces.append(whole)
            continue
        first, *rest = index
        layers = first.stop - first.start
        for i in range(layers):
            at = slice(first.start + i, first.start + i + 1)
            pieces.append(_Piece(wanted, (at, *rest), tuple(some), (i, layers)))
    return pieces


def _by_layer(nbytes: int, platform: str) -> bool:
    """Whether a stack of layers is put together on its device."""
    return platform != "cpu" and nbytes > _WHOLE  # a CPU takes the host's memory over instead


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


def _put(piece: _Piece, host: np.ndarray, device: Any, part: jax.Array | None) -> jax.Array:
    """The device's part after a piece."""
    where = SingleDeviceSharding(device)
    on_tpu = device.platform == "tpu"

    def format(ndim: int) -> Any:
        return row_major(ndim, where) if on_tpu else where

    placed = jax.device_put(host, format(host.ndim))
    if piece.layer is None:
        return placed
    at, layers = piece.layer
    if part is None:
        part = _empty((layers, *host.shape[1:]), placed.dtype, format(host.ndim))
    return writer(format(host.ndim))(part, placed, np.int32(at))


def _empty(shape: tuple[int, ...], dtype: Any, format: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=format)()


@functools.cache
def writer(format: Any) -> Callable[..., jax.Array]:
    """`(stack, entries, at)` to the stack with the entries from `at` on, in place; for arrays of that format."""

    def write(stack: jax.Array, entries: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, entries, at, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=format)
