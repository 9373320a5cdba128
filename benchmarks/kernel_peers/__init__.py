"""What JAX ships, at the ops' named cases.

A module of this folder, named after an op, has `peer(case) -> list[(name, Call)]`: JAX's kernels for the same work
at the block sizes that are worth trying; an empty list where JAX has none.
"""

import importlib
import importlib.util
from functools import cache

from jaxinf.aot import cases
from pallas_kernels.named import Call


@cache
def of(op: str, case: str) -> dict[str, Call]:
    """Peers of a named case, by name."""
    if importlib.util.find_spec(f"{__name__}.{op}") is None:
        return {}
    return dict(importlib.import_module(f"{__name__}.{op}").peer(cases.find(op, case)))


def call(op: str, case: str, name: str) -> Call:
    """One of them: the function that `jaxinf.aot.Job`s of peers name."""
    return of(op, case)[name]
