"""How parameters are made: one helper, so that each carries its logical axes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], dtype, *, std: float) -> nnx.Param:
    """A parameter drawn from N(0, std^2). `axes` names each dimension for the sharding rules."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=tuple(axes))


def constant(value: float, shape: Sequence[int], axes: Sequence[str | None], dtype) -> nnx.Param:
    """A parameter filled with `value`."""
    return nnx.Param(jnp.full(shape, value, dtype), logical_axes=tuple(axes))
