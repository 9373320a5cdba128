"""The time of a whole program: its operations in the order of the compiler's schedule, and what runs beside them.

Three things work at once: the core, one queue of copies between HBM and VMEM, and the links to other chips. An
operation takes as long as its own schedule (`emulator`), or as the bytes that it moves beside copies in flight,
which share the bandwidth. Asynchronous copies and collectives run from their start to their done; others hold the
core up. Copies that a kernel leaves on their way run until they are through; the kernel that waits for any of them
begins when all of them are. Loops of known length are run twice, and their second trip counts for all that follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxinf.aot import hlo
from jaxinf.aot.collectives import KINDS
from jaxinf.aot.shapes import shapes
from jaxinf.aot.static import twins
from jaxinf.aot.static.report import Operation

_KEPT = 24  # operations that a timeline names
_WORKING = ("fusion", "custom-call", "convolution", "sort", "scatter", "gather", "reduce")
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")


@dataclass(frozen=True)
class Part:
    """An operation of a program, or a collective.

    Attributes:
      times: it runs. seconds: of the whole program, waits included.
      bytes: between HBM and the core, all times together.
    """

    name: str
    kind: str  # "kernel", "fusion", "collective", "copy"
    times: int
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Endless:
    """A loop of the program itself whose length is not known.

    Attributes:
      began: seconds after the program did. seconds: of its first trip.
    """

    name: str
    began: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """What a program takes.

    Attributes:
      seconds: from its first operation to its last.
      hbm_seconds, ici_seconds: that HBM and the links are busy. core_seconds: that the core is, without waits.
      parts: those that take longest.
      unknown: names of kernels whose loops or copies could not be followed; their time is too low.
      endless: the program's own loops of unknown length, which count once, in order.
      inner: further loops of unknown length.
      missing: operations without a schedule, which take no time here: names, the most frequent first.
    """

    seconds: float
    hbm_seconds: float
    ici_seconds: float
    core_seconds: float
    hbm_bytes: float
    parts: tuple[Part, ...]
    unknown: tuple[str, ...] = ()
    endless: tuple[Endless, ...] = ()
    inner: int = 0
    missing: tuple[str, ...] = ()

    @property
    def bound(self) -> str:
        """What is busiest; "waits" where nothing is busy for half of the time."""
        busy = {"HBM": self.hbm_seconds, "ICI": self.ici_seconds, "core": self.core_seconds}
        name = max(busy, key=lambda key: busy[key])
        return name if busy[name] > 0.5 * self.seconds else f"waits ({name} {busy[name] / self.seconds:.0%})"


@dataclass
class _State:
    now: float = 0.0  # of the core
    memory: float = 0.0  # when the queue to HBM is empty
    links: float = 0.0
    bytes: float = 0.0
    busy: float = 0.0
    told: float = 0.0  # seconds that the links were busy
    pending: dict[str, float] = field(default_factory=dict)  # what is under way -> when it is done
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    moved: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def figures(self) -> tuple[float, float, float, float, float, float]:
        return self.now, self.memory, self.links, self.bytes, self.busy, self.told


def timeline(
    text: str,
    operations: Mapping[str, Operation],
    *,
    clock: float,
    bandwidth: float,
    collective: Callable[[hlo.Instruction], float],
) -> Timeline:
    """The time of a scheduled program.

    Args:
      text: its HLO.
      operations: by name, what the static model says of each.
      clock: Hz. bandwidth: bytes/s between HBM and what the program runs on.
      collective: seconds of a collective.
    """
    return _Walk(text, operations, clock, bandwidth, collective).run()


def is_collective(instruction: hlo.Instruction, found: hlo.Computations) -> hlo.Instruction | None:
    """The collective that an instruction is, starts, or holds in a fusion of its own."""
    if instruction.opcode.removesuffix("-start") in KINDS:
        return instruction
    if instruction.opcode in ("fusion", "async-start", "call"):
        for line in found.get(instruction.called("calls") or instruction.called("to_apply") or "", ()):
            if any(f" {kind}(" in line or f" {kind}-start(" in line for kind in KINDS):
                inner = hlo.instructions([line])
                return inner[0] if inner else None
    return None


class _Walk:
    def __init__(
        self,
        text: str,
        operations: Mapping[str, Operation],
        clock: float,
        bandwidth: float,
        collective: Callable[[hlo.Instruction], float],
    ) -> None:
        self._found, self._entry = hlo.computations(text)
        self._parsed: dict[str, list[hlo.Instruction]] = {}
        self._operations = operations
        self._clock, self._bandwidth, self._collective = clock, bandwidth, collective
        self._twins = twins.Twins(self._found, operations)
        self._missing: dict[str, float] = defaultdict(float)
        self._state = _State()
        self._endless: list[Endless] = []
        self._inner: set[str] = set()
        self._depth = 0
        self._kinds: dict[str, str] = {}
        self._sources: dict[str, str] = {}  # of parts of tuples
        self._unmatched: set[str] = set()

    def run(self) -> Timeline:
        self._computation(self._entry, 1)
        state = self._state
        seconds = max(state.now, state.memory, state.links)
        longest = sorted(state.seconds, key=lambda name: -state.seconds[name])[:_KEPT]
        parts = tuple(
            Part(name, self._kinds[name], round(state.counts[name]), state.seconds[name], state.moved[name])
            for name in longest
        )
        unclear = {
            o.name
            for o in self._twins.used.values()
            if (o.truncated or (o.kernel and (o.unknown_copies or not all(l.known for l in o.loops))))
        }
        return Timeline(
            seconds=seconds,
            hbm_seconds=state.bytes / self._bandwidth,
            ici_seconds=state.told,
            core_seconds=state.busy,
            hbm_bytes=state.bytes,
            parts=parts,
            unknown=tuple(sorted(unclear | self._unmatched)),
            endless=tuple(self._endless),
            inner=len(self._inner),
            missing=tuple(sorted(self._missing, key=lambda name: -self._missing[name])[:_KEPT]),
        )

    def _computation(self, name: str, weight: float) -> None:
        if name not in self._parsed:
            self._parsed[name] = hlo.instructions(self._found.get(name, []))
        for instruction in self._parsed[name]:
            self._instruction(instruction, weight)

    def _instruction(self, i: hlo.Instruction, weight: float) -> None:
        opcode = i.opcode
        if opcode == "get-tuple-element":
            self._sources[i.name] = i.operands[0]
        elif opcode == "while":
            self._loop(i, weight)
        elif opcode == "conditional":
            self._branch(i, weight)
        elif opcode.endswith("-done"):
            self._done(i, weight)
        elif inner := is_collective(i, self._found):
            self._tell(i, inner, weight)
        elif opcode.removesuffix("-start") in _COPIES and opcode.endswith("-start"):
            self._copy(i, weight)
        elif operation := self._twins.find(i):
            self._operation(i, operation, weight)
        elif opcode in ("call", "async-start"):
            self._computation(i.called("to_apply") or i.called("calls") or "", weight)
        elif opcode in _WORKING:
            self._missing[i.name] += weight

    def _note(self, name: str, kind: str, weight: float, seconds: float, size: float = 0.0) -> None:
        state = self._state
        self._kinds[name] = kind
        state.counts[name] += weight
        state.seconds[name] += weight * seconds
        state.moved[name] += weight * size

    def _operation(self, i: hlo.Instruction, o: Operation, weight: float) -> None:
        state, size = self._state, o.read + o.written - o.pending
        waited = self._await(i) if o.awaited else 0.0
        began, queued = state.now, max(0.0, state.memory - state.now)
        # Copies in flight and the operation's own take turns until either is done.
        shared = min(size / self._bandwidth, queued)
        for name, when in state.pending.items():
            if when > began:
                state.pending[name] = when + shared
        taken = max(o.time / self._clock, size / self._bandwidth + shared if size else 0.0)
        state.now = began + taken
        state.memory = max(state.memory, began) + size / self._bandwidth if size else state.memory
        state.bytes += size
        state.busy += o.cycles / self._clock
        if o.pending:
            state.bytes += o.pending
            state.memory = max(state.memory, began) + o.pending / self._bandwidth
            state.pending[i.name] = state.memory
        kind = "kernel" if o.kernel else "fusion"
        self._note(i.name, kind, weight, waited + taken, size + o.pending)

    def _await(self, i: hlo.Instruction) -> float:
        """Seconds until what earlier operations fetch for this one is there."""
        state = self._state
        sources = {self._sources.get(name, name) for name in i.operands} & state.pending.keys()
        if not sources:
            self._unmatched.add(i.name)
        arrived = max((state.pending.pop(name) for name in sources), default=state.now)
        waited = max(0.0, arrived - state.now)
        state.now += waited
        return waited

    def _copy(self, i: hlo.Instruction, weight: float) -> None:
        state, size = self._state, _crossing(i.shape)
        state.bytes += size
        state.memory = max(state.memory, state.now) + size / self._bandwidth
        state.pending[i.name] = state.memory
        self._note(i.name, "copy", weight, 0.0, size)

    def _tell(self, i: hlo.Instruction, inner: hlo.Instruction, weight: float) -> None:
        state, seconds = self._state, self._collective(inner)
        state.links = max(state.links, state.now) + seconds
        state.told += seconds
        if i.opcode.endswith("-start"):
            state.pending[i.name] = state.links
            self._note(i.name, "collective", weight, 0.0)
        else:
            taken, state.now = state.links - state.now, state.links
            self._note(i.name, "collective", weight, taken)

    def _done(self, i: hlo.Instruction, weight: float) -> None:
        state = self._state
        for name in i.operands:
            if name in state.pending:
                waited = max(0.0, state.pending.pop(name) - state.now)
                state.now += waited
                self._note(name, self._kinds[name], 0.0, 0.0)
                state.seconds[name] += weight * waited

    def _branch(self, i: hlo.Instruction, weight: float) -> None:
        """The longest branch."""
        start, best = self._state, None
        for name in i.branches:
            self._state = _copied(start)
            self._computation(name, weight)
            if best is None or self._state.now > best.now:
                best = self._state
        self._state = best or start

    def _loop(self, i: hlo.Instruction, weight: float) -> None:
        trips, body, began = hlo.trips(i.rest, self._found), i.called("body") or "", self._state.now
        if trips is not None and trips < 1:
            return
        self._depth += 1
        self._computation(body, weight)
        self._depth -= 1
        if trips is None and not self._depth:
            self._endless.append(Endless(i.name, began, self._state.now - began))
        elif trips is None:
            self._inner.add(i.name)
        if trips is None or trips == 1:
            return
        before = self._state.figures()
        self._depth += 1
        self._computation(body, weight * (trips - 1))
        self._depth -= 1
        each = [b - a for a, b in zip(before, self._state.figures(), strict=True)]
        state = self._state
        rest = trips - 2
        state.now += rest * each[0]
        state.memory += rest * each[1] if each[1] > 0 else 0.0
        state.links += rest * each[2] if each[2] > 0 else 0.0
        state.bytes += rest * each[3]
        state.busy += rest * each[4]
        state.told += rest * each[5]
        state.pending = {name: when + rest * each[0] for name, when in state.pending.items()}


def _copied(state: _State) -> _State:
    return _State(
        *state.figures(),
        dict(state.pending),
        defaultdict(float, state.seconds),
        defaultdict(float, state.counts),
        defaultdict(float, state.moved),
    )


def _crossing(shape: str) -> int:
    """Bytes between HBM and VMEM of a copy's start, whose shape is (target, source, context)."""
    pieces = [piece for piece in _split(shape) if any(shapes(piece))]
    if len(pieces) < 2:
        return 0
    inside = ["S(1)" in piece for piece in pieces[:2]]
    size = min(sum(shapes(piece)) for piece in pieces[:2])
    return 0 if all(inside) else size if any(inside) else 2 * size


def _split(shape: str) -> list[str]:
    """The parts of a tuple's shape."""
    parts, depth, start = [], 0, 1
    for at, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(shape[start:at])
            start = at + 1
    return parts or [shape]
