"""What the dump of a schedule leaves unsaid about each chip: how long an instruction holds a unit.

The compiler's own scheduling tables show in its dumps: how many bundles after a branch still run, and for how many
bundles a matrix unit counts as held by one product. Hardware times of others agree with them (docs/kernels.md).
"""

from dataclasses import dataclass

from pallas_kernels.chips import Chip
from pallas_kernels.errors import UnsupportedError

DMA_LATENCY = 0.55e-6
"""Seconds from issue to arrival of a small copy: kernels bound by it on v5e and v6e fit 0.46 to 0.62 us."""


@dataclass(frozen=True)
class Machine:
    """How one core of a chip runs bundles. Times are in cycles, one bundle each."""

    chip: Chip
    delay: int  # bundles after a branch that still run
    held: int  # by one product of 16-bit or 8-bit operands in a matrix unit
    held32: int  # the same, float32
    granule: int  # bytes in which copies are counted

    @property
    def core_bandwidth(self) -> float:
        """Bytes/s from and to HBM, a core's share."""
        return self.chip.bandwidth / self.chip.cores


_FACTS = {
    "v4": (1, 16, 8, 512),
    "v5e": (4, 16, 8, 32),
    "v5p": (4, 16, 8, 32),
    "v6e": (4, 8, 4, 32),
    "7x": (6, 8, 4, 32),
}


def machine(chip: Chip) -> Machine:
    """The machine that this chip's schedules are written for.

    Raises:
      UnsupportedError: its schedules are not understood.
    """
    if chip.name not in _FACTS:
        raise UnsupportedError(f"the cycles of a {chip.name} are not modelled, only those of {', '.join(_FACTS)}.")
    return Machine(chip, *_FACTS[chip.name])
