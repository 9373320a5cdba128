"""How far a long load has come, on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from jaxinf.checkpoint.streaming import Progress

PATIENCE = 1.0
"""Seconds before a bar appears."""


@contextlib.contextmanager
def shown(progress: Progress | None, label: str) -> Iterator[Progress | None]:
    """`progress`, or where there is none a bar with bytes and bytes a second: on a terminal, when it takes long.

    It is drawn on stderr by the first process alone.
    """
    if progress is not None or not sys.stderr.isatty() or _process() > 0:
        yield progress
        return
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        report: Progress | None = None

        def late(done: int, total: int) -> None:
            nonlocal report
            if report is None and time.monotonic() - began > PATIENCE:
                report = stack.enter_context(_bar(label))
            if report is not None:
                report(done, total)

        yield late


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _process() -> int:
    import jax

    return jax.process_index()
