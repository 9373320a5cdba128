"""Block sizes as data: who decides them, and the tables that ship.

Numbered precedence: 1. the call's explicit `blocks`; 2. the op's `tuned.json` (made by `jaxinf tune`) for the chip
and the problem's bucket; 3. the op's heuristic from the chip's VMEM. Whatever is chosen must fit the chip's VMEM.

Each op with a kernel has a module `blocks.py` with
  Problem      frozen dataclass, the static facts of a call (shapes, dtypes, which masks)
  Blocks       frozen dataclass of integers
  bucket(problem) -> str                       key of the tuned tables: dtype and rounded shape
  vmem_bytes(problem, blocks) -> int           what the kernel holds in VMEM, double buffers included
  refusals(problem, blocks) -> list[str]       why the kernel cannot work with them; a bucket holds several shapes
  candidates(problem, chip) -> list[Blocks]    what a search tries; some may not fit
  heuristic(problem, chip) -> Blocks           fits
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pallas_kernels.chips import MIB, Chip
from pallas_kernels.errors import InputError

# The compiler keeps some of VMEM for itself (semaphores, spilled registers, its own copies).
USABLE = 0.9


def budget(chip: Chip) -> int:
    """Bytes of VMEM that a kernel may ask for."""
    return int(USABLE * chip.vmem)


@cache
def table(op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The shipped table of an op: chip -> bucket -> {"blocks": {...}, "ms": ..., "compiler": ..., "date": ...}."""
    path = Path(__file__).parent / op / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass(frozen=True)
class Choice:
    """What `choose` was asked and answered."""

    op: str
    problem: Any
    chip: Chip
    blocks: Any


_observed: ContextVar[list[Choice] | None] = ContextVar("observed", default=None)


@contextmanager
def observe() -> Iterator[list[Choice]]:
    """Collects the choices made in this context, one a kernel that is traced; what jit has cached makes none."""
    choices: list[Choice] = []
    token = _observed.set(choices)
    try:
        yield choices
    finally:
        _observed.reset(token)


def choose(op: str, blocks: ModuleType | Any, problem: Any, chip: Chip, explicit: Any = None) -> Any:
    """The block sizes of one call, by the precedence above.

    Raises:
      InputError: the explicit sizes need more VMEM than the chip has; says how many bytes of how many.
    """
    chosen = _choose(op, blocks, problem, chip, explicit)
    choices = _observed.get()
    if choices is not None:
        choices.append(Choice(op, problem, chip, chosen))
    return chosen


def _choose(op: str, blocks: ModuleType | Any, problem: Any, chip: Chip, explicit: Any) -> Any:
    if explicit is not None:
        need = blocks.vmem_bytes(problem, explicit)
        if need > budget(chip):
            raise InputError(
                f"blocks={explicit} need {need / MIB:.1f} MiB of VMEM in {op}, but a {chip.name} has "
                f"{budget(chip) / MIB:.1f} MiB for a kernel: make them smaller."
            )
        return explicit
    entry = table(op).get(chip.name, {}).get(blocks.bucket(problem))
    if entry is not None:
        tuned = blocks.Blocks(**entry["blocks"])
        if not blocks.refusals(problem, tuned) and blocks.vmem_bytes(problem, tuned) <= budget(chip):
            return tuned
    return blocks.heuristic(problem, chip)
