"""What the verbs print: JSON, aligned tables, sizes for people, and progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (done, in all), in bytes or another unit."""


def print_json(value: Any) -> None:
    """One JSON document on stdout; what is infinite or NaN would be no JSON and is refused."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """A line for people, on stderr, so that stdout stays what was asked for."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]], *, header: bool = False, right: bool = False) -> str:
    """Rows of equally many cells in aligned columns.

    header: the first row is underlined. right: all columns but the first are aligned on the right.
    """
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    rows = [*rows[:1], ["-" * w for w in widths], *rows[1:]] if header else rows

    def line(row: Sequence[str]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        cells = [cell.rjust(width) if right and column else cell.ljust(width) for column, (cell, width) in pairs]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def size(count: float) -> str:
    """Bytes for people: 1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def many(count: int) -> str:
    """A count for people: 134515008 -> "134.5 M (134,515,008)"."""
    for unit, value in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= value:
            return f"{count / value:.1f} {unit} ({count:,})"
    return str(count)


def seconds(value: float) -> str:
    """A duration for people: 0.0123 -> "12.3 ms"."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


@contextlib.contextmanager
def progress(label: str, unit: str = "bytes") -> Iterator[Progress]:
    """A bar on a terminal, a line every tenth elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _lines(label, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    amount = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(label: str, unit: str) -> Progress:
    said = 0

    def report(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 if not total else done * 10 // total
        if tenth > said:
            said = tenth
            amount = f"{tenth * 10} % of {size(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
            note(f"{label}: {amount}")

    return report
