"""Where an LM's compiled programs come from and go to. Imports the compiler's room only when that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxinf.models import CausalLM

if TYPE_CHECKING:
    from jaxinf.aot.export import Programs

User = Callable[[str, Any], Any]
"""From the name of a program and its jitted function to what is called instead."""
Opened: TypeAlias = "Programs"


def none(name: str, program: Any) -> Any:
    """Every program as it is."""
    return program


def opened(folder: str | Path) -> Opened:
    """The programs of a folder.

    Raises:
      InputError: it holds none.
    """
    from jaxinf.aot.export import Programs

    return Programs(folder)


def user(programs: str | Path | Opened | None, model: CausalLM) -> User:
    """What runs a model's programs: those of a folder, where they fit."""
    if programs is None:
        return none
    return (opened(programs) if isinstance(programs, (str, Path)) else programs).user(model)


def save(
    folder: str | Path, model: CausalLM, warm: Callable[[User], None], *, overwrite: bool, portable: Sequence[str]
) -> list[dict[str, Any]]:
    """Keeps the programs that `warm` calls for; see `LM.save_programs`."""
    from jaxinf.aot.export import recording

    with recording(folder, model, overwrite=overwrite, portable=portable) as recorder:
        warm(recorder.user)
    return recorder.programs
