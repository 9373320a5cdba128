"""The collectives of a compiled program: what each chip sends, how often, to whom."""

import math
import re
from dataclasses import dataclass

from jaxinf.aot.shapes import shapes

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(rf"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations|true_computation|false_computation)=")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: of `KINDS`.
      bytes: of its result on one chip (of its operand for a reduce-scatter: the larger side).
      chips: that take part in one group.
      times: how often the program runs it; loops of known length are multiplied out.
    """

    name: str
    kind: str
    bytes: int
    chips: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each chip sends each time, by the ring algorithm."""
        others = (self.chips - 1) / self.chips
        factor = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return factor * self.bytes


def of(hlo: str) -> tuple[Collective, ...]:
    """The collectives in the text of a compiled program (`executable.as_text()`)."""
    computations = _computations(hlo)
    times = _times(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            if m := _OP.match(line):
                found.append(_collective(line, m, times.get(name, 1)))
    return tuple(found)


def _collective(line: str, m: re.Match[str], times: int) -> Collective:
    name, result, kind, start = m[1], m[2], m[3], m[4]
    sizes = [size for size in shapes(result) if size > 4]
    # The start of an asynchronous one gives (operands, results): the results are the second half.
    if start and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    chips = _group(line)
    size = sum(sizes) or sum(shapes(result))
    return Collective(name, kind, size * chips if kind == "reduce-scatter" else size, chips, times)


def _group(line: str) -> int:
    if m := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(m[1])
    if m := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        return _mesh_group(m[1], m[2])
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(m[1].split(","))
    if m := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return len(re.findall(r"\{", m[1]))
    return 1


def _mesh_group(mesh: str, axes: str) -> int:
    """Chips along axes, such as "'a','b':(2)4" (the second: 4 of them) of the mesh "'a'=2,'b'=8"."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part) if part else sizes[name] for name, part in parts) if parts else 1


def _computations(hlo: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if m := _HEAD.match(line):
            lines = found.setdefault(m[1], [])
        else:
            lines.append(line)
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Trips of the loop in this line: as the compiler says, or as its condition does, if it counts up from 0."""
    if m := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(m[1])
    if m := re.search(r"condition=%?([\w.\-]+)", line):
        condition = "\n".join(computations.get(m[1], ()))
        test = re.search(r"ROOT .* compare\(.*?, %?([\w.\-]+)\), direction=LT", condition)
        limit = test and re.search(rf"%{re.escape(test[1])} = s32\[\]\S* constant\((\d+)\)", condition)
        return int(limit[1]) if limit else 1
    return 1


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, from the trip counts that the compiler knows."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        for line in lines:
            trips = _trips(line, computations)
            for m in _CALLED.finditer(line):
                rest = line[m.end() :]
                names = re.match(r"\{([^}]*)\}", rest) or re.match(r"(%?[\w.\-]+)", rest)
                for callee in re.findall(r"[\w.\-]+", names[1]) if names else ():
                    count = trips if m.group().startswith("body") else 1
                    callers.setdefault(callee, []).append((name, count))
    known: dict[str, int] = {}

    def times(name: str) -> int:
        if name not in known:
            known[name] = 1  # HLO has no recursion
            known[name] = sum(times(caller) * count for caller, count in callers.get(name, ())) or 1
        return known[name]

    return {name: times(name) for name in computations}
