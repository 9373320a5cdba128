"""One layer of arrays that are stacked over layers, not cut out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked:
    """Stands where layer `layer` of `whole [L, ...]` would: for ops that index a stack themselves.

    A loop over layers that cuts its weights out copies them for every op that is a kernel; a mixture of experts
    would copy all of its experts to use a few.
    """

    whole: jax.Array
    layer: jax.Array


def unstack(value: Any) -> tuple[jax.Array, jax.Array | None]:
    """The array, and which layer of it is meant: None where it is that layer itself."""
    return (value.whole, value.layer) if isinstance(value, Stacked) else (value, None)
