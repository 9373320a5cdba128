"""What the model says about a program: dataclasses, and the sums over them."""

from dataclasses import dataclass

from jaxinf.aot.static.machine import machine
from pallas_kernels import chips

F32_PASSES = 6  # bfloat16 products of which one of float32 (precision HIGHEST) is made
_LOW = 0.98  # of a roofline: a time below this much of it is not believed


@dataclass(frozen=True)
class Loop:
    """Bundles [start, end), run `trips` times each time that they are entered."""

    start: int
    end: int
    trips: float
    known: bool  # whether the emulator could follow its condition


@dataclass(frozen=True)
class Region:
    """Bundles [start, end) under a condition."""

    number: int
    start: int
    end: int
    reached: int
    fraction: float | None  # of the times it was reached, how often it ran; None: never reached
    known: bool


@dataclass(frozen=True)
class Occupancy:
    """Share of a span's cycles, of each unit; a matrix unit is busy while it is held."""

    mxu: float = 0.0
    xlu: float = 0.0
    valu: float = 0.0
    eup: float = 0.0
    load: float = 0.0
    store: float = 0.0
    scalar: float = 0.0

    @property
    def most(self) -> tuple[str, float]:
        """The busiest unit."""
        names = {"load": "VLD", "store": "VST", "scalar": "SALU"}
        return max(((names.get(k, k.upper()), v) for k, v in vars(self).items()), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Span:
    """A run of bundles [start, end) that all ran `count` times."""

    start: int
    end: int
    count: int
    share: float  # of the operation's cycles
    units: Occupancy
    empty: float  # share of bundles with nothing in them
    spills: int  # registers stored to VMEM for want of registers
    fills: int

    @property
    def bound(self) -> str:
        unit, busy = self.units.most
        return f"{unit} {busy:.0%}" if busy > 0.6 else f"latency ({unit} {busy:.0%})"


@dataclass(frozen=True)
class Operation:
    """An HLO operation: a Pallas kernel or a fusion of XLA's. On two cores: the slower one's time, both's bytes."""

    name: str
    kernel: bool  # written in Pallas
    bundles: int
    instructions: int  # bundles of the final dump, without the empty ones
    cycles: int  # without waits for copies
    time: float  # cycles, waits included
    read: int  # bytes from HBM
    written: int
    copies: int
    pieces: int  # contiguous runs of bytes in HBM
    steps: int  # trips of the outermost loop
    macs: int  # multiply-adds given to the matrix units
    vmem: int  # bytes
    loops: tuple[Loop, ...]
    regions: tuple[Region, ...]
    spans: tuple[Span, ...]  # the longest first
    unknown_branches: int
    unknown_copies: int
    truncated: bool
    pending: int = 0  # of the bytes read, those that it leaves on their way, for a later operation to wait for
    awaited: int = 0  # bytes of copies that an earlier operation began and that it waits for


@dataclass(frozen=True)
class Estimate:
    """The static time of one program on one chip (or on the one core that it runs on).

    Attributes:
      chip: name.
      cores: of the chip that the program runs on.
      flops, bytes, dtype: the least that it must do, as the caller said (`Work`), or as XLA counts.
      stated: whether the caller said so.
      prefetched: bytes that XLA's own asynchronous copies move from HBM.
    """

    chip: str
    cores: int
    flops: float
    bytes: float
    dtype: str
    stated: bool
    operations: tuple[Operation, ...]
    prefetched: int = 0

    @property
    def _fraction(self) -> float:
        """Of the chip, how much the program runs on."""
        return self.cores / chips.find(self.chip).cores

    @property
    def read(self) -> int:
        """Bytes from HBM."""
        return self.prefetched + sum(o.read for o in self.operations)

    @property
    def written(self) -> int:
        """Bytes to HBM."""
        return sum(o.written for o in self.operations)

    @property
    def copies(self) -> int:
        """Descriptors of copies between HBM and the cores."""
        return sum(o.copies for o in self.operations)

    @property
    def copy_bytes(self) -> float:
        """Bytes a copy, on average."""
        return (self.read + self.written - self.prefetched) / max(1, self.copies)

    @property
    def hbm_seconds(self) -> float:
        """Time that the bytes which it moves take at peak bandwidth."""
        return (self.read + self.written) / (chips.find(self.chip).bandwidth * self._fraction)

    @property
    def issue_seconds(self) -> float:
        """Time without waits for copies."""
        return sum(o.cycles for o in self.operations) / chips.find(self.chip).clock

    @property
    def seconds(self) -> float:
        """Each operation once, one after another; never less than the bytes moved take."""
        return max(sum(o.time for o in self.operations) / chips.find(self.chip).clock, self.hbm_seconds)

    @property
    def flop_seconds(self) -> float:
        chip = chips.find(self.chip)
        peak = {"int8": chip.int8, "float32": chip.bf16 / F32_PASSES}.get(self.dtype, chip.bf16)
        return self.flops / (peak * self._fraction)

    @property
    def byte_seconds(self) -> float:
        return self.bytes / (chips.find(self.chip).bandwidth * self._fraction)

    @property
    def roofline_seconds(self) -> float:
        return max(self.flop_seconds, self.byte_seconds)

    @property
    def ratio(self) -> float:
        """Time over roofline; 0 where nothing is known to be needed."""
        return self.seconds / self.roofline_seconds if self.roofline_seconds else 0.0

    @property
    def main(self) -> Operation | None:
        """The operation that takes longest."""
        return max(self.operations, key=lambda o: o.time, default=None)

    @property
    def vmem(self) -> int:
        """Bytes of VMEM that the hungriest kernel holds."""
        return max((o.vmem for o in self.operations), default=0)

    @property
    def bound(self) -> str:
        """What holds the program up: HBM, copies in flight, a unit, or the latency of dependent instructions."""
        if not self.seconds or self.main is None:
            return "nothing"
        if self.hbm_seconds > 0.9 * self.seconds:
            return f"HBM {self.hbm_seconds / self.seconds:.0%}"
        waiting = 1 - self.main.cycles / self.main.time if self.main.time else 0.0
        if waiting > 0.4:
            return f"waits for copies {waiting:.0%}"
        return self.main.spans[0].bound if self.main.spans else "nothing"

    @property
    def suspect(self) -> tuple[str, ...]:
        """Why the time may be too low to be believed; empty: no reason found."""
        why = []
        count = "" if self.stated else " (as XLA counts)"
        for name, least in (("FLOP", self.flop_seconds), ("HBM", self.byte_seconds)):
            if self.seconds < _LOW * least:
                why.append(f"below the {name} roofline{count}, x{self.seconds / least:.2f}")
        for number, what in (
            (
                sum(not loop.known for o in self.operations if o.kernel for loop in o.loops),
                "loops of unknown length",
            ),
            (sum(o.unknown_copies for o in self.operations), "unmatched copies or waits"),
            (sum(o.truncated for o in self.operations), "operations not run to their end"),
        ):
            if number:
                why.append(f"{number} {what}")
        return tuple(why)

    @property
    def mxu_flops(self) -> float:
        """FLOP that the matrix units were given, padding and masked parts included."""
        return 2.0 * sum(o.macs for o in self.operations)


def row(estimate: Estimate) -> dict[str, float | str | int | bool | list[str]]:
    """A flat record of an estimate, for tables and JSON."""
    machine(chips.find(estimate.chip))
    return {
        "chip": estimate.chip,
        "cores": estimate.cores,
        "ms": estimate.seconds * 1e3,
        "issue_ms": estimate.issue_seconds * 1e3,
        "roofline_ms": estimate.roofline_seconds * 1e3,
        "ratio": estimate.ratio,
        "bound": estimate.bound,
        "hbm_bytes": estimate.read + estimate.written,
        "copies": estimate.copies,
        "copy_bytes": estimate.copy_bytes,
        "vmem_bytes": estimate.vmem,
        "spills": sum(s.spills for o in estimate.operations[:1] for s in o.spans[:1]),
        "suspect": list(estimate.suspect),
    }
