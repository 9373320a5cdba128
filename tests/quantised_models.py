"""Tiny quantised models for tests of checkpoints: every matrix is 64 x 64, so that programs are few."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, fold
from jaxinf.quant import QTensor, round_to_nearest

D = 64
_ATTENTION = AttentionSpec(4, 4, 16, rope=RopeSpec(16))
rounded = functools.partial(jax.jit, static_argnames=("name", "group"))(round_to_nearest)
DENSE = ModelSpec(40, D, fold([LayerSpec(_ATTENTION, FFNSpec(D))] * 2), 64)
_SPARSE = LayerSpec(_ATTENTION, MoESpec(2, D, TokenChoice(top_k=1)))
SPARSE = ModelSpec(40, D, fold([LayerSpec(_ATTENTION, FFNSpec(D)), _SPARSE] * 2), 64)


def model(spec: ModelSpec = DENSE, layout: str = "list", dtype: Any = jnp.float32) -> CausalLM:
    return CausalLM(spec, rngs=nnx.Rngs(3), param_dtype=dtype, layout=layout)


def changed(model: CausalLM, change: Callable[[str, jax.Array], Any]) -> CausalLM:
    """The model with other values for its matrices: `change(path, matrix)`."""
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if variable.get_metadata().get("quantizable", False):
            variable = variable.replace(change(".".join(map(str, path)), variable.get_value()))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def with_everything(model: CausalLM) -> CausalLM:
    """Matrices in every format, with every array that a `QTensor` may have."""

    def change(path: str, w: jax.Array) -> QTensor:
        name = next(n for n in ("query", "key", "value", "out", "up", "gate", "down") if f"{n}" in path.split("."))
        lead, columns = w.shape[:-2], w.shape[-1]
        if name == "query":
            zeros = jnp.arange(4.0 * columns).reshape(4, columns) % 5
            q = rounded(w, name="int4", group=16)
            return dataclasses.replace(q, zeros=jnp.broadcast_to(zeros, (*lead, 4, columns)))
        if name == "key":
            rows = jnp.broadcast_to(jnp.asarray([3, -1], jnp.int32), (*lead, 2))
            wide = jnp.broadcast_to(
                jnp.arange(2.0 * columns, dtype=jnp.bfloat16).reshape(2, columns), (*lead, 2, columns)
            )
            q = rounded(w, name="int8")
            return dataclasses.replace(q, outliers=wide, rows=rows, activations="int8")
        if name == "value":
            order = jnp.broadcast_to(jnp.arange(w.shape[-2], dtype=jnp.int32)[::-1], (*lead, w.shape[-2]))
            return dataclasses.replace(rounded(w, name="ternary"), order=order)
        formats = {"out": "mxfp4", "up": "nf4", "gate": "kmeans8", "down": "fp8_e5m2"}
        return rounded(w, name=formats[name])

    return changed(model, change)


def stacked(model: CausalLM) -> CausalLM:
    """A listed model of one segment, stacked."""
    (segment,) = model.spec.segments
    period = len(segment.period)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    graph, state = nnx.split(CausalLM(model.spec, rngs=nnx.Rngs(0), layout="stacked"))
    made = []
    for path, variable in nnx.to_flat_state(state):
        if path[0] != "segments":
            made.append((path, flat[path]))
            continue
        *head, slot = path[:4]
        rows = [flat[(*head, slot + r * period, *path[4:])].get_value() for r in range(segment.repeats)]
        whole = jax.tree.map(lambda *parts: jnp.asarray(np.stack([np.asarray(p) for p in parts])), *rows)
        made.append((path, variable.replace(whole)))
    return nnx.merge(graph, nnx.from_flat_state(made))


def arrays(model: CausalLM) -> dict[str, tuple]:
    """The bits of all arrays, by path."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        at = ".".join(map(str, path))
        for key, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            host = np.asarray(leaf)
            found[at + jax.tree_util.keystr(key)] = (host.shape, str(host.dtype), host.tobytes())
        if isinstance(value, QTensor):
            found[at] = (value.activations,)
    return found


def dequantised(model: CausalLM) -> CausalLM:
    """The plain model that a quantised one stands for, whose inputs are not rounded."""

    def plain(value: Any) -> Any:
        return value.dequantize(jnp.float32) if isinstance(value, QTensor) else value

    graph, state = nnx.split(model)
    flat = [(path, v.replace(plain(v.get_value()))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
