"""Copies, semaphores and scalar memory as a program meets them.

HBM is one queue in order at peak bandwidth, each copy arriving no sooner than `DMA_LATENCY` after it was issued.
What a copy costs besides its bytes is not modelled, so `Traffic` counts copies and their contiguous pieces: a
kernel of many small ones is slower than its time here.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinf.aot.static.machine import DMA_LATENCY, Machine
from jaxinf.aot.static.scalars import POINTER, UNKNOWN, Word, signed

_OPERAND = 1 << 42  # apart lie the addresses of operands
_STEP = 512  # bytes in which the contiguous pieces of a strided copy are counted


@dataclass
class Arrival:
    time: float
    granules: int
    flag: Word


@dataclass
class Traffic:
    """Between HBM and the rest, of one core. Bytes."""

    read: int = 0
    written: int = 0
    copies: int = 0
    pieces: int = 0  # contiguous runs of bytes in HBM
    unknown: int = 0  # copies and waits that could not be matched
    awaited: int = 0  # by waits on semaphores that came as operands: of copies that an earlier operation began


class Memory:
    """State of one emulated run.

    Args:
      words: values of an operation's scalar operands, as the 32-bit words they are in scalar memory.
      shared: copies of the other core that arrive here as well.
    """

    def __init__(
        self, machine: Machine, words: Mapping[int, Sequence[int]], shared: Sequence[Arrival] = ()
    ) -> None:
        self.traffic = Traffic()
        self.stalled = 0.0
        self.shared = list(shared)
        self._granule = machine.granule
        self._cycles = machine.chip.clock / machine.core_bandwidth  # a byte
        self._latency = DMA_LATENCY * machine.chip.clock
        self._words = words
        self._cells: dict[int, Word] = {}
        self._operands: dict[int, int] = {}
        self._semaphores: dict[int, str] = {}  # operands that are semaphores: address -> kind
        self._free = 0.0  # when the queue to HBM is empty
        self._flags: dict[Any, list[Arrival]] = defaultdict(list)  # oldest first
        for arrival in shared:
            self._flags[arrival.flag >> 32].append(Arrival(arrival.time, arrival.granules, arrival.flag))

    def operand(self, index: int, kind: str, scalar: bool, semaphore: bool = False) -> Word:
        """A scalar operand's value, or the address of another's first byte."""
        if scalar:
            words = self._words.get(index)
            return words[0] if words else UNKNOWN
        base = (POINTER if kind == "input" else 2 * POINTER) + index * _OPERAND
        self._operands[base] = index
        if semaphore:
            self._semaphores[base] = kind
        return base

    def _outside(self, flag: Word) -> str | None:
        """Whether a flag is of an operand, and of which kind."""
        return None if flag is UNKNOWN else self._semaphores.get(flag & -_OPERAND)

    @property
    def pending(self) -> int:
        """Bytes on their way when the run ended, that tell semaphores which are results."""
        left = (a for queue in self._flags.values() for a in queue if self._outside(a.flag) == "output")
        return self._granule * sum(a.granules for a in left)

    def load(self, address: Word) -> Word:
        return UNKNOWN if address is UNKNOWN else self._cells.get(address, UNKNOWN)

    def store(self, address: Word, value: Word) -> None:
        if address is not UNKNOWN:
            self._cells[address] = value

    def copy(
        self,
        time: float,
        source: str,
        target: str,
        granules: Word,
        flag: Word,
        semaphore: int | None,
        words: Word,
        origin: Word,
        stride: Word,
        steps: Word,
    ) -> None:
        """Starts a copy. words: where it lands in scalar memory. origin: the address it comes from."""
        if target == "smem" and isinstance(origin, int) and words is not UNKNOWN:
            index = next((self._operands[a] for a in (origin, origin >> 4) if a in self._operands), None)
            for k, word in enumerate(self._words.get(index, ()) if index is not None else ()):
                self._cells[words + k] = word
        self.traffic.unknown += granules is UNKNOWN or (flag is UNKNOWN and semaphore is None)
        if granules is UNKNOWN:
            return
        size = granules * self._granule
        ways = (source == "hbm") + (target == "hbm")
        if ways:
            self.traffic.read += size * (source == "hbm")
            self.traffic.written += size * (target == "hbm")
            self.traffic.copies += 1
            self.traffic.pieces += self._pieces(size, stride, steps)
            self._free = max(self._free, time) + ways * size * self._cycles
            done = max(self._free, time + self._latency + size * self._cycles)
        else:
            done = time + 0.2 * self._latency
        self.signal(time, flag, semaphore, granules, done)

    def _pieces(self, size: int, stride: Word, steps: Word) -> int:
        if stride is UNKNOWN or steps is UNKNOWN or steps <= 0 or stride * self._granule <= steps * _STEP:
            return 1
        return max(1, -(-size // (steps * _STEP)))

    def signal(
        self, time: float, flag: Word, semaphore: int | None, granules: Word, done: float | None = None
    ) -> None:
        """Adds an arrival to a flag. Vector code that copied by itself signals too; waits take back a negative."""
        if granules is UNKNOWN or (done is None and signed(granules) <= 0):
            return
        when = time if done is None else done
        if (
            flag is not UNKNOWN and flag >> 48 and not self._outside(flag)
        ):  # (cores << 13 | flag) << 16 | flag: it arrives at both cores
            flag &= 0xFFFF0000FFFF
            self.shared.append(Arrival(when, granules, flag))
        self._flags[semaphore if flag is UNKNOWN else flag >> 32].append(Arrival(when, granules, flag))

    def wait(self, time: float, flag: Word, semaphore: int | None, granules: Word) -> float:
        """Cycles until so many granules have arrived on the flag; an unknown one takes any of its semaphore.

        What an earlier operation began has arrived: a `Timeline` says when.
        """
        if self._outside(flag) == "input" and granules is not UNKNOWN:
            self.traffic.awaited += granules * self._granule
            return 0.0
        queue = self._flags[semaphore if flag is UNKNOWN else flag >> 32]
        when, need = time, granules
        for arrival in list(queue) if flag is not UNKNOWN or semaphore is not None else ():
            if flag is not UNKNOWN and arrival.flag is not UNKNOWN and arrival.flag != flag:
                continue
            taken = arrival.granules if granules is UNKNOWN else min(need, arrival.granules)
            if taken:
                when = max(when, arrival.time)
                arrival.granules -= taken
                need = need - taken
        queue[:] = [arrival for arrival in queue if arrival.granules]
        self.traffic.unknown += granules is UNKNOWN or need > 0
        self.stalled += when - time
        return when - time
