"""The wide model that a quantised one stands for."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from jaxinf.models.causal_lm import CausalLM
from jaxinf.quant import QTensor


def dequantize(model: CausalLM) -> CausalLM:
    """The model with plain matrices, in the dtype of its activations: what quantised ones stand for.

    Inputs are rounded no more (`w8a8`). A model without quantised matrices comes back as it is.
    """
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        flat.append((path, variable.replace(_wide(value, model.dtype)) if isinstance(value, QTensor) else variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


@partial(jax.jit, static_argnums=1)
def _wide(q: QTensor, dtype) -> jax.Array:
    return q.dequantize(dtype)
