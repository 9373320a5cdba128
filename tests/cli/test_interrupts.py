"""Interrupts that Python drops."""

import sys

import pytest

from jaxinf.cli import interrupts


def test_a_dropped_interrupt_comes_late_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))
    interrupts.keep()

    class Falls:
        def __init__(self, error: type[BaseException]):
            self.error = error

        def __del__(self) -> None:
            raise self.error

    interrupts.check()
    Falls(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()
    Falls(ZeroDivisionError)
    interrupts.check()
    assert reported == [ZeroDivisionError]
