"""Interrupts that are dropped before anybody hears of them."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import pytest

from jaxinf.cli import interrupts


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    # As a terminal has it: what is started in the background ignores Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_a_press_that_code_clears_comes_late_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As extension modules do that compare or hash objects of Python and ignore what these raise."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    interrupts.keep()
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()


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
