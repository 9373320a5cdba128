"""The same function with more weights: feed-forward layers with hidden channels that add nothing.

What such a model writes is what the original writes, and a pass of it reads as many bytes as one of a model that
was trained at that size. So it shows what a method gains where weights come from memory, with the original's
predictions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxinf
from jaxinf.layers import FFNSpec
from jaxinf.models import CausalLM


def widened(lm: jaxinf.LM, width: int) -> jaxinf.LM:
    """The model with `width` hidden channels in each dense feed-forward layer: the new ones have random weights in,
    and zeros out. Experts stay as they are. For float models of layout "list"."""
    old = lm.model
    segments = []
    for segment in old.spec.segments:
        period = [
            dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, width=width))
            if isinstance(layer.ffn, FFNSpec)
            else layer
            for layer in segment.period
        ]
        segments.append(dataclasses.replace(segment, period=tuple(period)))
    spec = dataclasses.replace(old.spec, segments=tuple(segments))
    new = CausalLM(spec, rngs=nnx.Rngs(0), param_dtype=old.dtype, layout=old.layout)
    graph, state = nnx.split(new)
    known = dict(nnx.to_flat_state(nnx.state(old)))

    def filled(path, variable):
        own, given = variable.get_value(), known[path].get_value()
        if own.shape == given.shape:
            return given
        out = path[-2] == "down"
        whole = jnp.zeros_like(own) if out else own
        return jax.lax.dynamic_update_slice(whole, given, (0,) * own.ndim)

    flat = {path: variable.replace(filled(path, variable)) for path, variable in nnx.to_flat_state(state)}
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    return jaxinf.LM(model, lm.tokenizer)


def parameters(model: CausalLM) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(model)))
