"""Slices of TPU chips by the names that clouds sell them under, and the wires between their chips.

Sources: slice sizes and topologies from Google's pages (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x).
v5e and v6e names count chips; v4, v5p and tpu7x names count TensorCores, of which those chips have two: v5p-128
is 64 chips. Bandwidth of the interconnect (ICI) from the same pages, as bytes/s a chip in both directions: v4
600e9 (6 links), v5e 400e9 (4), v5p 1200e9 (6), v6e 800e9 (4), TPU7x 1200e9 (6). An axis of a v5e or v6e slice
closes to a ring at 16 chips; v4, v5p and TPU7x slices of whole cubes of 4x4x4 close on every axis ("How to
Scale Your Model", jax-ml.github.io/scaling-book/tpus, which also gives about a microsecond a hop).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pallas_kernels import chips
from pallas_kernels.chips import Chip
from pallas_kernels.errors import InputError

GIB = 1 << 30
HOP = 1e-6
"""Seconds from a chip to its neighbour, however little is sent."""


@dataclass(frozen=True)
class Wires:
    """How the chips of one kind are joined.

    Attributes:
      links: of each chip.
      link: bytes/s of one link in one direction.
      closes: an axis of this many chips, or with `cubes` of any multiple of them, is a ring.
      cubes: axes close only where all of them do.
    """

    links: int
    link: float
    closes: int
    cubes: bool


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a kind of chip besides `pallas_kernels.chips`.

    Attributes:
      wires: between chips.
      devices: that JAX shows for a chip, each with its own memory.
      memory: bytes of HBM of a device that programs may use: what libtpu's compiler allows.
      counts_cores: whether the number in a slice's name counts cores.
      topologies: slices that are sold.
    """

    wires: Wires
    devices: int
    memory: int
    counts_cores: bool
    topologies: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

FACTS: Mapping[str, Facts] = {
    "v4": Facts(Wires(6, 50e9, 4, True), 2, int(15.25 * GIB), True, (*_CUBES, "16x16x16")),
    "v5e": Facts(Wires(4, 50e9, 16, False), 1, int(15.75 * GIB), False, _FLAT),
    "v5p": Facts(Wires(6, 100e9, 4, True), 1, int(95.74 * GIB), True, (*_CUBES, "16x16x16", "16x16x24")),
    "v6e": Facts(Wires(4, 100e9, 16, False), 1, int(31.25 * GIB), False, _FLAT),
    "7x": Facts(Wires(6, 100e9, 4, True), 2, int(94.75 * GIB), True, (*_CUBES, "16x16x16")),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "7x", "v7x": "7x"}


@dataclass(frozen=True)
class Slice:
    """Chips of one kind, wired as `shape` says.

    Attributes:
      name: as it was asked for.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def facts(self) -> Facts:
        return FACTS[self.chip.name]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def cores(self) -> int:
        return self.chips * self.chip.cores

    @property
    def devices(self) -> int:
        """That JAX shows."""
        return self.chips * self.facts.devices

    @property
    def topology(self) -> str:
        """The smallest slice that holds it and that the compiler can describe, such as "v5e:4x4"."""
        if self.chips < _chips(self.chip.topology):
            return self.chip.topology
        return f"{self.chip.topology.partition(':')[0]}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator(self) -> str:
        """The TPU_ACCELERATOR_TYPE of that, which libtpu wants to know before it is loaded."""
        kind, _, count = self.chip.accelerator.rpartition("-")
        described = _chips(self.topology)
        return f"{kind}-{int(count) * described // _chips(self.chip.topology)}"

    @property
    def rings(self) -> tuple[bool, ...]:
        """Of each axis, whether its ends are joined."""
        wires = self.facts.wires
        closed = [n >= wires.closes and n % wires.closes == 0 for n in self.shape]
        return tuple(c and (not wires.cubes or all(closed)) for c in closed)

    # Of one device: a chip, or a core that JAX shows as a device.

    @property
    def memory(self) -> int:
        """Bytes of HBM that a program on one device may use."""
        return self.facts.memory

    @property
    def bandwidth(self) -> float:
        """Bytes/s between a device and its HBM."""
        return self.chip.bandwidth / self.facts.devices

    @property
    def bf16(self) -> float:
        """FLOP/s of a device."""
        return self.chip.bf16 / self.facts.devices


def _chips(topology: str) -> int:
    return math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def named(chip: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The slices of a chip that are sold: name and shape, smallest first."""
    facts, kind = FACTS[chip], "tpu7x" if chip == "7x" else chip
    for topology in facts.topologies:
        shape = tuple(int(n) for n in topology.split("x"))
        count = math.prod(shape) * (chips.CHIPS[chip].cores if facts.counts_cores else 1)
        yield f"{kind}-{count}", shape


def find(name: str) -> Slice:
    """The slice of that name: "v5e-16", "v5p-128", or a chip and a topology, "v6e:4x8".

    A chip alone is its smallest slice of several chips.

    Raises:
      InputError: no such chip or slice; says which there are.
    """
    kind, separator, rest = _split(name)
    chip = chips.find(_ALIASES.get(kind, kind))
    if separator == "-":
        for known, shape in named(chip.name):
            if known.rpartition("-")[2] == rest:
                return Slice(name, chip, shape)
        exist = ", ".join(known for known, _ in named(chip.name))
        counted = "cores, of which a chip has two" if FACTS[chip.name].counts_cores else "chips"
        raise InputError(f"slice={name!r}, but of {chip.name} there are {exist} (the number counts {counted}).")
    shape = rest if separator else chip.topology.partition(":")[2]
    sizes = shape.split("x")
    axes = FACTS[chip.name].wires.links // 2
    if len(sizes) != axes or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        example = "4x4" if axes == 2 else "2x2x1"
        raise InputError(f"topology={shape!r} of {name!r}, but {axes} sizes such as {example} are needed.")
    return Slice(name, chip, tuple(map(int, sizes)))


def _split(name: str) -> tuple[str, str, str]:
    """Chip, "-", ":" or nothing, and what follows."""
    text = name.strip().lower()
    for separator in (":", "-"):
        kind, found, rest = text.rpartition(separator) if separator == "-" else text.partition(separator)
        if found and kind and kind != "tpu":
            return kind, separator, rest
    return text, "", ""
