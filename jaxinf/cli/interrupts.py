"""Ctrl-C that is lost: raised inside callbacks of the collector or of extension modules, which drop exceptions."""

from __future__ import annotations

import signal
import sys

_pressed = False


def keep() -> None:
    """From now on `check` knows of Ctrl-C, and nothing is printed of interrupts that were dropped."""
    report = sys.unraisablehook

    def hook(unraisable) -> None:
        global _pressed
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _pressed = True
        else:
            report(unraisable)

    sys.unraisablehook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _press)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed since the last check, even if it was raised and dropped."""
    global _pressed
    if _pressed:
        _pressed = False
        raise KeyboardInterrupt


def _press(number, frame) -> None:
    global _pressed
    _pressed = True
    signal.default_int_handler(number, frame)
