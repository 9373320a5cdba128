"""Which implementation of an op runs: asked for by name, or chosen by the platform a program is lowered for."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

from pallas_kernels.errors import InputError, UnsupportedError

Implementation = Literal["reference", "xla", "pallas", "interpret"]


def check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        allowed = ", ".join(get_args(Implementation))
        raise InputError(f"implementation={implementation!r}, but only {allowed} or None are available.")


def dispatch(
    op: str,
    implementation: Implementation | None,
    *arrays: Any,
    reference: Callable,
    xla: Callable,
    pallas: Callable[..., Any],
    unsupported: Sequence[str] = (),
) -> Any:
    """Calls one of the implementations with `arrays` (pytrees).

    None takes the kernel where the program is lowered for a TPU and the XLA form elsewhere, so that a host without
    a TPU lowers the program that a TPU runs. What the kernel cannot do, `unsupported` says, one reason each; then
    None takes the XLA form on TPUs too.

    Args:
      pallas: takes `interpret: bool` besides the arrays.

    Raises:
      InputError: no such implementation.
      UnsupportedError: the kernel was asked for by name and there are reasons against it; it lists them all.
    """
    check_implementation(implementation)
    if implementation == "reference":
        return reference(*arrays)
    if implementation in ("pallas", "interpret"):
        if unsupported:
            raise UnsupportedError(f"{op} has no kernel for this call: {'; '.join(unsupported)}.")
        return pallas(*arrays, interpret=implementation == "interpret")
    if implementation == "xla" or unsupported:
        return xla(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=lambda *a: pallas(*a, interpret=False), default=xla)
