"""Models that learn to be stored rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.models import CausalLM
from jaxinf.quant import TRAINABLE, FakeQuant, QTensor, fake_quant, rounded
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class Rounding:
    """How the matrices of attention and feed-forward layers, experts among them, are stored after training.

    format: one of `jaxinf.quant.TRAINABLE`.
    group: rows that share a scale; None: the format's own.
    activations: "int8": their inputs are rounded to bytes with a scale a token.
    """

    format: str = "int4"
    group: int | None = None
    activations: Literal["int8"] | None = None


BITNET = Rounding("ternary", activations="int8")
"""BitNet b1.58's layers (Ma et al. 2024, arXiv:2402.17764)."""
B158 = "b1.58"


def rounding_of(name: str, group: int | None = None, activations: Literal["int8"] | None = None) -> Rounding:
    """A rounding by the name of its format, or "b1.58" for `BITNET`.

    Raises:
      InputError: an unknown name (lists them), or options beside "b1.58", which has its own.
    """
    if name == B158:
        if group is not None or activations not in (None, "int8"):
            raise InputError(f"{B158} is ternary with bytes for inputs: leave out group and activations")
        return BITNET
    if name not in TRAINABLE:
        raise InputError(f"rounding {name!r} must be one of {', '.join((*TRAINABLE, B158))}")
    return Rounding(name, group, activations)


def start_qat(model: CausalLM, rounding: Rounding) -> CausalLM:
    """The model with a `FakeQuant` for each matrix: it computes as `finish_qat` of it will, and can be trained.

    Embeddings, the head, norms, biases and routers stay as they are. Works on abstract models too.

    Raises:
      InputError: a rounding that some matrix does not allow (named), or a model that is rounded already.
    """
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value, meta = variable.get_value(), variable.get_metadata()
        if isinstance(value, (QTensor, FakeQuant)):
            raise InputError("the model is rounded already; start from the original")
        if meta.get("quantizable", False):
            try:
                made = fake_quant(
                    value, rounding.format, rounding.group, rounding.activations, meta["logical_axes"]
                )
            except InputError as error:
                raise InputError(f"{'.'.join(map(str, path))}: {error}") from error
            variable = variable.replace(made)
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def finish_qat(model: CausalLM) -> CausalLM:
    """The trained model with each matrix stored rounded, a `QTensor`; its logits are those that it was trained for.

    Raises:
      InputError: the model is not one of `start_qat`'s.
    """
    store = jax.jit(rounded)
    graph, state = nnx.split(model)
    flat, found = [], False
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(value, FakeQuant):
            found = True
            abstract = isinstance(value.values, jax.ShapeDtypeStruct)
            variable = variable.replace(jax.eval_shape(store, value) if abstract else store(value))
        flat.append((path, variable))
    if not found:
        raise InputError("the model was not trained with rounding; begin with start_qat, or use quantize")
    return nnx.merge(graph, nnx.from_flat_state(flat))


def in_bfloat16(model: CausalLM) -> CausalLM:
    """The model with its plain arrays in bfloat16; quantised matrices stay as they are."""
    graph, state = nnx.split(model)
    flat = [
        (path, v if isinstance(v.get_value(), QTensor) else v.replace(v.get_value().astype(jnp.bfloat16)))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))
