"""Starting JAX on its device, without what the platforms' libraries say about machines that have no such device."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


class DeviceError(RuntimeError):
    """JAX cannot use the device that it was told to use."""


def open_device() -> None:
    """Starts JAX's default backend. JAX_LOGGING_LEVEL lets the platforms speak.

    Raises:
      DeviceError: JAX finds no device, or another process holds it.
    """
    import jax

    quiet = contextlib.nullcontext() if os.environ.get("JAX_LOGGING_LEVEL") else silenced_stderr()
    try:
        with quiet:
            jax.devices()
    except RuntimeError as error:
        raise DeviceError(f"JAX cannot start on this machine: {error}") from error


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    """Sends the process's stderr nowhere, that of C++ libraries included, which no logging level reaches."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # closed: nothing to silence
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
