"""Ctrl-C that falls into a callback of the collector, where Python reports exceptions and drops them."""

from __future__ import annotations

import sys

_dropped = False


def keep() -> None:
    """From now on `check` knows of interrupts that were dropped, and nothing is printed of them."""
    report = sys.unraisablehook

    def hook(unraisable) -> None:
        global _dropped
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _dropped = True
        else:
            report(unraisable)

    sys.unraisablehook = hook


def check() -> None:
    """Raises the KeyboardInterrupt that was dropped, if one was."""
    global _dropped
    if _dropped:
        _dropped = False
        raise KeyboardInterrupt
