"""How long collectives take on the wires of a slice, by the formulas of the textbooks.

"How to Scale Your Model" (jax-ml.github.io/scaling-book/sharding): what a chip must take in, over the bandwidth of
the links that it can use at once, and never less than a microsecond for each hop on the longest way. An axis whose
ends are not joined is as fast as a ring that uses each link in one direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxinf.aot.slices import HOP, Slice
from sharding.collectives import AXES

ON_CHIP = 6.0
"""How many links the two devices of one chip are worth to each other (Google's page on TPU7x)."""


@dataclass(frozen=True)
class Way:
    """A part of a slice's axis that a mesh axis runs along.

    Attributes:
      length: chips. ring: the ends are joined.
      link: bytes/s of a link in one direction.
    """

    length: int
    ring: bool
    link: float

    @property
    def hops(self) -> int:
        """On the longest way."""
        return self.length // 2 if self.ring else self.length - 1

    @property
    def rate(self) -> float:
        """Bytes/s that a chip at its end can take in."""
        return self.link * (2 if self.ring else 1)


Ways = tuple[Way, ...]


def ways(where: Slice, sizes: Mapping[str, int]) -> dict[str, Ways]:
    """What each axis of a mesh runs along: whole axes of the slice where sizes agree, the innermost axis first."""
    link = where.facts.wires.link
    left = [Way(n, ring, link) for n, ring in zip(where.shape, where.rings, strict=True) if n > 1]
    if where.facts.devices > 1:
        left.append(Way(where.facts.devices, False, ON_CHIP * link))
    found: dict[str, Ways] = {}
    for axis in reversed(AXES):
        size = sizes.get(axis, 1)
        found[axis], left = _take(size, left) if size > 1 else ((), left)
    return found


def _take(size: int, left: list[Way]) -> tuple[Ways, list[Way]]:
    for count in range(len(left), 0, -1):
        for chosen in _choices(len(left), count):
            if math.prod(left[i].length for i in chosen) == size:
                return tuple(left[i] for i in chosen), [w for i, w in enumerate(left) if i not in chosen]
    taken, rest = [], []
    for way in sorted(left, key=lambda w: (-w.link, -w.length)):
        part = math.gcd(way.length, size)
        if part > 1:
            taken.append(way if part == way.length else Way(part, False, way.link))
            size //= part
        if part < way.length:
            rest.append(Way(way.length // part, False, way.link))
    if size > 1:  # no box of the slice: some way along slow links
        taken.append(Way(size, False, min((w.link for w in left), default=1.0)))
    return tuple(taken), rest


def _choices(n: int, count: int) -> list[tuple[int, ...]]:
    if count == 0:
        return [()]
    return [(*head, last) for last in range(n) for head in _choices(last, count - 1)]


def part(ways: Ways, chips: int) -> Ways:
    """Of an axis that runs along `ways`, what a group of so many neighbours does."""
    found = []
    for way in ways:
        length = math.gcd(way.length, chips)
        if length > 1:
            found.append(way if length == way.length else Way(length, False, way.link))
            chips //= length
    if chips > 1:
        found.append(Way(chips, False, min((w.link for w in ways), default=1.0)))
    return tuple(found)


def between(where: Slice, places: Sequence[tuple[int, ...]]) -> Ways:
    """What a group of chips at these coordinates runs along: the box that they fill, or else one long line.

    A last coordinate beyond the slice's axes counts the devices of a chip.
    """
    link = where.facts.wires.link
    axes = [
        *zip(where.shape, where.rings, [link] * len(where.shape), strict=True),
        (where.facts.devices, False, ON_CHIP * link),
    ]
    found = []
    for axis, (length, ring, rate) in enumerate(axes):
        at = {place[axis] for place in places if axis < len(place)}
        if len(at) > 1:
            found.append(Way(len(at), ring and len(at) == length, rate))
    if math.prod(way.length for way in found) != len(places):
        return (Way(len(places), False, link),)
    return tuple(found)


def seconds(kind: str, size: float, way: Ways) -> float:
    """Of one collective.

    Args:
      kind: as in `Use`.
      size: bytes of its larger side on one chip: the sum, the gathered array, what is scattered or exchanged.
    """
    if not way:
        return 0.0
    chips = math.prod(w.length for w in way)
    hops, rate = sum(w.hops for w in way), sum(w.rate for w in way)
    if kind == "collective-permute":
        return max(size / max(w.link for w in way), HOP)
    if kind == "all-to-all":
        # Half of the chips send half of theirs across the middle, both ways at once.
        return max(*(size * w.length / (8 if w.ring else 4) / w.link for w in way), HOP * hops)
    once = max((chips - 1) / chips * size / rate, HOP * hops)
    return 2 * once if kind == "all-reduce" else once
