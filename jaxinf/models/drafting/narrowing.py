"""A head with its matrices stored narrower."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.quant import QTensor, round_to_nearest

Head = TypeVar("Head", bound=nnx.Module)


def narrowed(head: Head, format: str | None = "int8", *, dtype=jnp.bfloat16) -> Head:
    """The head with its matrices rounded to the nearest, and all else in `dtype`.

    Args:
      format: a name in `jaxinf.quant.FORMATS`; None: matrices are in `dtype` too. Those that are rounded stay.

    Raises:
      InputError: an unknown format, or one that does not fit.
    """
    store = None if format is None else jax.jit(partial(round_to_nearest, name=format))
    graph, state = nnx.split(head)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(value, QTensor):
            pass
        elif store is not None and variable.get_metadata().get("quantizable", False):
            variable = variable.replace(store(value.astype(jnp.float32)))
        else:
            variable = variable.replace(value.astype(dtype))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))
