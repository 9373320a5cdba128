"""Runs the scalar core of a program: loops, branches, index maps and predicates of copies are all scalar code, so
trip counts, taken branches and traffic come out exactly; vector instructions are only counted."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxinf.aot.static.bundles import Program
from jaxinf.aot.static.memory import Arrival, Memory
from jaxinf.aot.static.scalars import UNKNOWN
from jaxinf.aot.static.translate import Block, Translator

MAX_BLOCKS = 3_000_000
MAX_SECONDS = 60.0


@dataclass
class Run:
    """What one core did."""

    count: list[int]  # of each bundle: how often it ran
    seen: Mapping[int, int]  # bundle of a branch: how often it was reached
    taken: Mapping[int, int]  # ... and taken
    unknown: frozenset[int]  # branches that depended on data not given
    time: float  # cycles, waits included
    truncated: bool  # it did not come to its end
    memory: Memory
    seconds: float  # that the emulation took

    @property
    def cycles(self) -> int:
        """Bundles that ran: the time without waits."""
        return sum(self.count)


def run(
    program: Program,
    words: Mapping[int, Sequence[int]] | None = None,
    core: int = 0,
    shared: Sequence[Arrival] = (),
    *,
    max_blocks: int = MAX_BLOCKS,
    max_seconds: float = MAX_SECONDS,
) -> Run:
    """Emulates a program to its end.

    A branch that skips code on unknown data is not taken, and a loop of unknown length runs once.

    Args:
      words: operand index -> its values, for scalar operands whose values are known.
      shared: `run(...).memory.shared` of the other core.
    """
    memory = Memory(program.machine, words or {}, shared)
    translator = Translator(program, core)
    state: dict = {"t": 0.0}
    blocks: dict[int, Block] = {}
    hits: dict[int, int] = defaultdict(int)
    seen: dict[int, int] = defaultdict(int)
    taken: dict[int, int] = defaultdict(int)
    unknown = set()
    position, done, began, truncated = 0, 0, time.monotonic(), False
    while position < program.n:
        block = blocks.get(position)
        if block is None:
            block = blocks[position] = translator.block(position)
        goes = block.run(state, memory)
        hits[position] += 1
        done += 1
        if block.branch is None:
            position = block.end
            continue
        seen[block.branch] += 1
        if goes is UNKNOWN:
            unknown.add(block.branch)
            goes = False
        taken[block.branch] += bool(goes)
        position = program.branches[block.branch].target if goes else block.end
        if done > max_blocks or (not done & 1023 and time.monotonic() - began > max_seconds):
            truncated = True
            break
    count = [0] * program.n
    for start, times in hits.items():
        for bundle in range(start, blocks[start].end):
            count[bundle] += times
    seconds = time.monotonic() - began
    return Run(count, seen, taken, frozenset(unknown), state["t"], truncated, memory, seconds)
