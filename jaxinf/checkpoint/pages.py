"""A file in memory, of which only what is asked for is read from disk."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import numpy as np

_MOST = 1 << 16
"""Runs of bytes of one array that are worth asking for one by one."""


class MappedFile:
    """The bytes of a file, paged in when touched. `data`: uint8, read-only."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, np.uint8)

    def expect(self, view: np.ndarray) -> None:
        """Has the system read the bytes of a view of `data` ahead, and where there are gaps nothing between them.

        By itself it reads 128 KiB around each page that is touched: of a few columns of a matrix, all of them.
        Arrays that are no views of `data` and systems without such advice are let be.
        """
        if not hasattr(mmap, "MADV_WILLNEED") or not view.size:
            return
        start = view.__array_interface__["data"][0] - self.data.__array_interface__["data"][0]
        found = _runs(view)
        if not 0 <= start < self.data.size or found is None:
            return
        offsets, length = found
        if len(offsets) > 1:
            self._advise(mmap.MADV_RANDOM, *_pages(start, start + offsets[-1] + length))
        begin, end = _pages(start, start + length)
        for offset in offsets[1:]:
            first, last = _pages(start + offset, start + offset + length)
            if first > end:
                self._advise(mmap.MADV_WILLNEED, begin, end)
                begin = first
            end = last
        self._advise(mmap.MADV_WILLNEED, begin, end)

    def _advise(self, advice: int, start: int, stop: int) -> None:
        self._map.madvise(advice, start, min(stop, len(self._map)) - start)


def _pages(start: int, stop: int) -> tuple[int, int]:
    """The bytes of the whole pages around these."""
    size = mmap.PAGESIZE
    return start // size * size, -(-stop // size) * size


def _runs(view: np.ndarray) -> tuple[list[int], int] | None:
    """The runs of bytes of an array, in the order of memory: `(where each starts, the length of each)`.

    None where there are too many.
    """
    axes = sorted(zip(view.strides, view.shape, strict=True))
    length = view.itemsize
    while axes and (axes[0][0] == length or axes[0][1] == 1):
        if axes[0][1] > 1:
            length *= axes[0][1]
        axes.pop(0)
    if any(stride < 0 for stride, _ in axes) or np.prod([n for _, n in axes], initial=1) > _MOST:
        return None
    steps = [range(0, stride * n, stride) if stride else range(1) for stride, n in reversed(axes)]
    return [sum(parts) for parts in itertools.product(*steps)], length
