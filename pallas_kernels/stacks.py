"""Operands that may be stacked over layers, of which a call means one, and which stay in HBM."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import InputError
from pallas_kernels.validate import check_range, integers


def check_layer(name: str, stacked: Any, layer: Any, ndim: int) -> jax.Array | None:
    """`layer` as an int32 scalar within the stack, or None for an operand of one axis less than `ndim`.

    Raises:
      InputError: axes and layer do not fit together, or a layer that is known now is outside of the stack.
    """
    if stacked.ndim not in (ndim - 1, ndim) or (stacked.ndim == ndim) != (layer is not None):
        raise InputError(
            f"{name}.shape={stacked.shape} and {layer=}, but a stack has {ndim} axes and needs a layer, and one "
            f"layer has {ndim - 1}."
        )
    if layer is None:
        return None
    layer = integers("layer", layer, (), "")
    check_range("layer", layer, 0, stacked.shape[0] - 1, f"{name} stacks {stacked.shape[0]} layers")
    return jnp.clip(layer, 0, stacked.shape[0] - 1)


def of_layer(stacked: Any, layer: Any) -> Any:
    """One layer's part of what may be stacked, and may be None."""
    if layer is None or stacked is None:
        return stacked
    return jax.lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)


def of_stack(part: Any, stacked: Any, layer: Any) -> Any:
    """The gradient of a stack from that of one layer's part, which may be None."""
    return part if layer is None or part is None else jnp.zeros_like(stacked).at[layer].set(part)


def in_hbm(array: jax.Array, interpret: bool, *, aliased: bool = False) -> jax.Array:
    """For an operand of a TPU kernel that reads or writes a part of it.

    Else XLA, which takes it for read whole, copies one that fits into VMEM (128 MiB on a v6e) there and back
    around each kernel: all layers, for every layer. An alias of it in the results lies where it does; of such
    aliases JAX before 0.10 makes a type that no other operation takes, so there it is left undone.
    """
    if aliased and jax.__version_info__ < (0, 10):
        return array
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def from_hbm(arrays: Any) -> Any:
    """For results that are aliases of operands `in_hbm`.

    One that is a result of the program too, and is read by nothing in it, would keep the mark of HBM, which the
    program's argument does not have: libtpu 0.0.42.1 refuses that.
    """
    return jax.lax.optimization_barrier(arrays)
