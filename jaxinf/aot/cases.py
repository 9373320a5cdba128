"""The ops' named cases, found by name."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pallas_kernels
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.named import Call


@cache
def ops() -> tuple[str, ...]:
    """Names of the ops that have a kernel."""
    root = Path(pallas_kernels.__path__[0])
    return tuple(sorted(f.parent.name for f in root.glob("*/kernel.py") if (f.parent / "cases.py").exists()))


def blocks_of(op: str) -> ModuleType:
    """The op's module of block sizes.

    Raises:
      InputError: no such op.
      UnsupportedError: its block sizes are not to be chosen.
    """
    _known(op)
    try:
        return importlib.import_module(f"pallas_kernels.{op}.blocks")
    except ModuleNotFoundError:
        raise UnsupportedError(f"{op} has no block sizes to choose.") from None


def models(op: str) -> dict[str, Any]:
    """The op's cases of real models, by name.

    Raises:
      InputError: no such op.
    """
    _known(op)
    module = importlib.import_module(f"pallas_kernels.{op}.cases")
    return {case.name: case for case in module.MODELS if hasattr(case, "call")}


def find(op: str, name: str) -> Any:
    """One case.

    Raises:
      InputError: no such op or case; says which there are.
    """
    cases = models(op)
    if name not in cases:
        near = [n for n in cases if n.split("-")[0] == name.split("-")[0]] or list(cases)
        some = ", ".join(near[:12]) + (", ..." if len(near) > 12 else "")
        raise InputError(f"case={name!r}, but {op} has {some}.")
    return cases[name]


def call(op: str, case: str, implementation: str = "pallas", blocks: dict[str, Any] | None = None) -> Call:
    """The call of a named case, with these block sizes or the op's own choice."""
    chosen = None if blocks is None else blocks_of(op).Blocks(**blocks)
    return find(op, case).call(implementation, blocks=chosen)


def _known(op: str) -> None:
    if op not in ops():
        raise InputError(f"op={op!r}, but {', '.join(ops())} are available.")
