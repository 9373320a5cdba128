"""How a training goes on: by steps or by the clock, with checkpoints on the way and at Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Course(Protocol):
    """A training that can be left and gone on with. step: updates so far; seconds: that they took."""

    step: int
    seconds: float

    def progress(self, minutes: float | None = None) -> float: ...

    def save(self) -> None: ...


def part_done(course: Course, steps: int, minutes: float | None) -> float:
    """Part of a run of `steps` that is done: of the steps or, where further, of the time allowed."""
    done = course.step / steps
    return min(1.0, done if minutes is None else max(done, course.seconds / 60 / minutes))


def run(
    course: Course,
    update: Callable[[float, float], None],
    *,
    minutes: float | None,
    until: int | None,
    checkpoint_minutes: float,
    on_save: Callable[[], None] | None = None,
) -> None:
    """Go on to the end, or to step `until`; save there, at Ctrl-C, and whenever `checkpoint_minutes` are over.

    update: of (progress, the monotonic time at which a run without pauses would have begun): one step, which
      counts up `course.step` and sets `course.seconds`.
    on_save: called after each save on the way.
    """
    last_save = time.monotonic()
    start = time.monotonic() - course.seconds
    try:
        while (progress := course.progress(minutes)) < 1.0 and (until is None or course.step < until):
            update(progress, start)
            if time.monotonic() - last_save > checkpoint_minutes * 60:
                course.save()
                if on_save is not None:
                    on_save()
                last_save = time.monotonic()
    except KeyboardInterrupt:
        course.save()
        raise
    course.save()
