"""How large a model is, from its spec alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import jax.numpy as jnp
from flax import nnx

from jaxinf.layers import ExpertChoice, MoESpec, TokenChoice
from jaxinf.models.causal_lm import CausalLM
from jaxinf.models.spec import ModelSpec


@dataclass(frozen=True)
class Description:
    """Sizes of a model.

    parameters: all of them. active_parameters: those that serve one token (of each mixture its chosen experts).
    bytes: of the weights.
    kv_bytes_per_token: a row's cache grows by this with each token, in layers that see everything.
    kv_bytes_of_windows: a row's cache in layers with a window holds at most this.
    """

    parameters: int
    active_parameters: int
    bytes: int
    kv_bytes_per_token: int
    kv_bytes_of_windows: int


def describe(spec: ModelSpec, *, dtype="bfloat16", cache_dtype=None) -> Description:
    """The sizes of `spec` with weights of `dtype` and keys and values of `cache_dtype` (default: the same).

    Nothing is computed or allocated, and a period of layers is looked at once.
    """
    once = replace(spec, segments=tuple(replace(s, repeats=1) for s in spec.segments))
    model = nnx.eval_shape(lambda: CausalLM(once, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype)))
    total, size, active = 0, 0, Fraction(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        leaf, repeats, share = variable.get_value(), 1, Fraction(1)
        if path[0] == "segments":
            segment = spec.segments[int(str(path[1]))]
            repeats = segment.repeats
            share = _share(segment.period[int(str(path[3]))].ffn) if "experts" in path else share
        count = math.prod(leaf.shape) * repeats
        total, size, active = total + count, size + count * leaf.dtype.itemsize, active + count * share
    item = jnp.dtype(cache_dtype or dtype).itemsize
    growing = windows = 0
    for layer in spec.layers():
        a = layer.attention
        entry = 2 * a.kv_heads * a.head_dim * item
        if a.window is None:
            growing += entry
        else:
            windows += entry * min(a.window, spec.context)
    return Description(total, math.ceil(active), size, growing, windows)


def _share(ffn) -> Fraction:
    """The share of a mixture's experts that serve one token."""
    assert isinstance(ffn, MoESpec)
    if isinstance(ffn.router, TokenChoice):
        return Fraction(ffn.router.top_k, ffn.experts)
    assert isinstance(ffn.router, ExpertChoice)
    return min(Fraction(1), Fraction(ffn.router.capacity_factor) / ffn.experts)
