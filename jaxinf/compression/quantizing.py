"""A model with its matrices stored narrower."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from jaxinf.models import CausalLM
from jaxinf.quant import FORMATS, QTensor, round_to_nearest
from pallas_kernels.errors import InputError

SCHEMES = tuple(FORMATS)
"""What `quantize` knows: every format, by rounding to the nearest."""


def quantize(model: CausalLM, scheme: str = "int8") -> CausalLM:
    """The model with the matrices of its attention and feed-forward layers, experts among them, quantised.

    Embeddings, the head, norms, biases and routers keep their precision: they are few bytes, and errors in them
    reach every token. Works on abstract models too. Arrays are given up one by one where nobody else holds them.

    Raises:
      InputError: an unknown scheme, or a model that is quantised already.
    """
    if scheme not in SCHEMES:
        raise InputError(f"quantize={scheme!r} must be one of {', '.join(SCHEMES)}")
    narrow = jax.jit(functools.partial(round_to_nearest, name=scheme))
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(value, QTensor):
            raise InputError("the model is quantised already; take the original")
        if variable.get_metadata().get("quantizable", False):
            abstract = isinstance(value, jax.ShapeDtypeStruct)
            variable = variable.replace(jax.eval_shape(narrow, value) if abstract else narrow(value))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))
