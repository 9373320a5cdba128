"""How parameters are made: one helper, so that each carries its logical axes."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.quant import QTensor


def normal(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype,
    *,
    std: float,
    in_place: bool = False,
    quantizable: bool = False,
) -> nnx.Param:
    """A parameter drawn from N(0, std^2).

    axes: names each dimension for the sharding rules.
    in_place: its module takes a `jaxinf.core.stacked.Stacked` for it, which saves cutting it out of a stack.
    quantizable: its module takes a `jaxinf.quant.QTensor` for it.
    """
    value = _draw(rngs.params(), tuple(shape), jnp.dtype(dtype), std)
    return nnx.Param(value, logical_axes=tuple(axes), in_place=in_place, quantizable=quantizable)


def is_in_place(path, value) -> bool:
    """A filter for `nnx.split`: parameters that modules take as a `Stacked`.

    Those made with `in_place`, and quantised ones: a plain matrix is cut out of its stack by XLA's own product.
    """
    if not isinstance(value, nnx.Variable):
        return False
    return value.get_metadata().get("in_place", False) or isinstance(value.get_value(), QTensor)


# Jitted, so that layers of one shape share a trace: a model of many layers is described in less time.
@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def constant(value: float, shape: Sequence[int], axes: Sequence[str | None], dtype) -> nnx.Param:
    """A parameter filled with `value`."""
    return nnx.Param(jnp.full(shape, value, dtype), logical_axes=tuple(axes))
