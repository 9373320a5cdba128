"""The collectives of a compiled program: what each chip sends, how often, to whom."""

import math
import re
from dataclasses import dataclass

from jaxinf.aot.hlo import Instruction, computations, times
from jaxinf.aot.shapes import shapes

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_OP = re.compile(rf"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: of `KINDS`.
      bytes: of its result on one chip (of its operand for a reduce-scatter: the larger side).
      chips: that take part in one group.
      times: how often the program runs it; loops of known length are multiplied out.
      group: the first group, as places in the program's list of devices.
    """

    name: str
    kind: str
    bytes: int
    chips: int
    times: int = 1
    group: tuple[int, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that each chip sends each time, by the ring algorithm."""
        others = (self.chips - 1) / self.chips
        factor = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return factor * self.bytes


def of(hlo: str) -> tuple[Collective, ...]:
    """The collectives in the text of a compiled program (`executable.as_text()`)."""
    lines_of, _ = computations(hlo)
    counts = times(lines_of)
    found = []
    for name, lines in lines_of.items():
        for line in lines:
            if m := _OP.match(line):
                found.append(_collective(line, m, counts[name]))
    return tuple(found)


def one(instruction: Instruction) -> Collective:
    """The collective of one instruction, which is one.

    Raises:
      ValueError: it is none.
    """
    line = f"  %{instruction.name} = {instruction.shape} {instruction.opcode}({instruction.rest}"
    if not (m := _OP.match(line)):
        raise ValueError(f"{instruction.name} is no collective")
    return _collective(line, m, 1)


def _collective(line: str, m: re.Match[str], times: int) -> Collective:
    name, result, kind, start = m[1], m[2], m[3], m[4]
    sizes = [size for size in shapes(result) if size > 4]
    # The start of an asynchronous one gives (operands, results): the results are the second half.
    if start and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    group = _first_group(line)
    chips = len(group) or 1
    size = sum(sizes) or sum(shapes(result))
    return Collective(name, kind, size * chips if kind == "reduce-scatter" else size, chips, times, group)


def _first_group(line: str) -> tuple[int, ...]:
    if m := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        size, dims = int(m[2]), [int(n) for n in m[3].split(",")]
        order = [int(n) for n in m[4].split(",")] if m[4] else list(range(len(dims)))
        return tuple(_transposed(dims, order)[:size])
    if m := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        return _mesh_group(m[1], m[2])
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(int(n) for n in m[1].split(",") if n)
    if m := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return _circle([(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", m[1])])
    return ()


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """0, 1, 2, ... as an array of `dims`, its axes in another order, flat."""
    strides = [math.prod(dims[axis + 1 :]) for axis in order]
    found = [0]
    for axis, stride in zip(order, strides, strict=True):
        found = [at + i * stride for at in found for i in range(dims[axis])]
    return found


def _circle(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """The places that are reached from the first one."""
    after = dict(pairs)
    at, found = pairs[0][0] if pairs else None, []
    while at is not None and at not in found:
        found.append(at)
        at = after.get(at)
    return tuple(found)


def _mesh_group(mesh: str, axes: str) -> tuple[int, ...]:
    """Places along axes, such as "'a','b':(2)4" (the second: 4 of them, after 2) of the mesh "'a'=2,'b'=8"."""
    names = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)]
    wanted = {m[1]: (int(m[2] or 1), m[3]) for m in re.finditer(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}
    found, stride = [0], 1
    for name, size in reversed(names):
        if name in wanted:
            before, part = wanted[name]
            count = int(part or size)
            step = stride * size // before // count
            found = [at + i * step for i in range(count) for at in found]
        stride *= size
    return tuple(sorted(found))
