"""A model with its matrices stored narrower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.compression.calibration import Calibration
from jaxinf.compression.layerwise import Settings, quantize_layer
from jaxinf.compression.observing import check_weight
from jaxinf.compression.schemes import Leaf, Target, leaves, plan, scheme_of
from jaxinf.compression.walking import Walk
from jaxinf.models import CausalLM
from jaxinf.quant import QTensor
from pallas_kernels.errors import InputError

Progress = Callable[[int, int], None]
"""Called with (layers or matrices done, all of them)."""


def quantize(
    model: CausalLM,
    scheme: str = "int8",
    *,
    group: int | None = None,
    rules: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> CausalLM:
    """The model with the matrices of its attention and feed-forward layers, experts among them, quantised.

    Embeddings, the head, norms, biases and routers keep their precision: they are few bytes beside the layers, and
    what is lost in them reaches every token. An error in the head moves the logits themselves; one in a norm a
    channel of every token; one in a router sends tokens to other experts, which is no small change.

    Args:
      model: without a mesh; abstract ones give abstract ones, of the shapes that their weights would give.
      scheme: a name in `SCHEMES`:
        int8, int4, fp8_e4m3, fp8_e5m2, mxfp4, nf4, ternary, kmeans4, kmeans8: weights are rounded to the nearest.
        w8a8: int8, and inputs are rounded to bytes with a scale a token.
        smoothquant: that, after outliers of inputs moved into weights.
        llm-int8: that, but for channels with outliers, which stay wide; of experts the weights alone are rounded.
        awq: int4, after channels with large inputs were scaled up; every group's scale is searched.
        gptq: int4; rounding errors are made up for by the rows that follow.
      group, rules: as of `plan`.
      calibration: text, for the last four. Layers are calibrated one by one, with what the quantised ones before
        give; of a mixture each expert with the tokens that it serves.
      progress: called as layers are done.
      settings: fields of `Settings`: alpha (SmoothQuant), threshold, outliers (LLM.int8()), act_order, damping
        (GPTQ).

    Raises:
      InputError: as `plan`; no calibration text where it is needed, or too little; NaN or infinity in weights or in
        what they meet; settings out of range.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    if unknown := set(settings) - set(known):
        raise InputError(f"{', '.join(sorted(unknown))} is no setting; there are {', '.join(known)}")
    chosen = Settings(**settings)
    targets = plan(model, scheme, group=group, rules=rules)
    found = list(leaves(model))
    abstract = any(isinstance(leaf.value, jax.ShapeDtypeStruct) for leaf in found)
    if abstract or not scheme_of(scheme).calibrated:
        return _rounded(model, targets, chosen, progress)
    if calibration is None:
        raise InputError(f"{scheme} is calibrated with text: give calibration=Calibration.of_texts(texts, encode)")
    widest = max((leaf.value.shape[-2] for leaf in found if targets[leaf.names[0]]), default=1)
    calibration = calibration.fitted(model.spec, widest)
    hidden, walk = calibration.hidden(model), Walk(model)
    for i in range(model.spec.depth):
        block, hidden = quantize_layer(walk.block(i), hidden, targets, at=f"layers.{i}.", settings=chosen)
        walk.put(i, block)
        if progress is not None:
            progress(i + 1, model.spec.depth)
    return walk.finished()


def _rounded(
    model: CausalLM, targets: Mapping[str, Target | None], settings: Settings, progress: Progress | None
) -> CausalLM:
    """Matrices one by one, each given up where nobody else holds it; or the shapes of what would become of them."""
    todo = {leaf.path: (leaf, target) for leaf in leaves(model) if (target := targets[leaf.names[0]]) is not None}
    graph, state = nnx.split(model)
    flat, done = [], 0
    for path, variable in nnx.to_flat_state(state):
        if path in todo:
            variable = variable.replace(_narrowed(*todo[path], settings))
            done += 1
            if progress is not None:
                progress(done, len(todo))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _narrowed(leaf: Leaf, target: Target, settings: Settings) -> QTensor:
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        q = jax.eval_shape(partial(target.format, group=target.group), leaf.value)
        q = dataclasses.replace(q, activations=target.activations)
        return _with_rows(q, leaf, settings.outliers) if target.method == "llm-int8" else q
    for i, name in enumerate(leaf.names):
        check_weight(leaf.value[i] if leaf.stacked else leaf.value, name)
    return dataclasses.replace(_round(leaf.value, target.format, target.group), activations=target.activations)


@partial(jax.jit, static_argnums=(1, 2))
def _round(w: jax.Array, format, group: int) -> QTensor:
    return format(w, group)


def _with_rows(q: QTensor, leaf: Leaf, count: int | None) -> QTensor:
    if count is None:
        raise InputError(
            "how many channels llm-int8 keeps wide is known only from text: give outliers= to plan for so many"
        )
    *lead, inner, columns = leaf.value.shape
    wide = jax.ShapeDtypeStruct((*lead, min(count, inner), columns), leaf.value.dtype)
    rows = jax.ShapeDtypeStruct((*lead, min(count, inner)), jnp.int32)
    experts = len(leaf.value.shape) - leaf.stacked > 2
    return dataclasses.replace(q, outliers=wide, rows=rows, activations=None if experts else q.activations)
