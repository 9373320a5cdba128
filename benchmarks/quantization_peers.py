"""The same weights through qwix, beside ours: `pip install qwix` (0.1.8 was looked at).

What is compared is how the codes are chosen, at equal bits: round-to-nearest, AWQ and GPTQ of the same matrices
with the same groups, float32 scales and the same inputs. qwix's matrices are put into the model as the floats that
they stand for, so that one program computes both.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.compression import Calibration, Settings, Target, plan
from jaxinf.compression.folding import Weights, weights_of, with_weights
from jaxinf.compression.gptq import errors
from jaxinf.compression.layerwise import folded, rounded
from jaxinf.compression.observing import Stats, run, statistics
from jaxinf.compression.walking import Walk
from jaxinf.layers import Block
from jaxinf.models import CausalLM
from jaxinf.quant import QTensor
from pallas_kernels.errors import UnsupportedError

Method = Literal["nearest", "awq", "gptq"]
OURS: Mapping[tuple[Method, int], str] = {
    ("nearest", 8): "int8",
    ("nearest", 4): "int4",
    ("awq", 4): "awq",
    ("gptq", 4): "gptq",
}
"""Our scheme for a method and bits."""


def version() -> str | None:
    """Of qwix; None: it is not installed."""
    try:
        return importlib.metadata.version("qwix")
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Error:
    """What rounding one matrix adds to its outputs: the sum of squares over that of the outputs themselves."""

    matrix: str
    ours: float
    qwix: float


def by_qwix(w: jax.Array, method: Method, bits: int, group: int, stats: Stats | None) -> jax.Array:
    """What qwix makes of a matrix `[K, N]`, as the floats that it stands for."""
    if version() is None:
        raise UnsupportedError("this comparison needs qwix: pip install qwix")
    from qwix._src.core import qarray
    from qwix.contrib import awq_core, gptq_core

    inner = w.shape[0]
    tiled = {1: group} if group != inner else {}
    how = qarray.HowToQuantize(qtype=f"int{bits}", channelwise_axes=[0], tiled_axes=tiled)
    transposed = w.astype(jnp.float32).T  # there a row is an output channel
    if method == "nearest":
        return qarray.dequantize(qarray.quantize(transposed, how)).T
    assert stats is not None
    if method == "gptq":
        assert stats.gram is not None
        q, _ = gptq_core.quantize_weight(transposed, stats.gram, how)
        return qarray.dequantize(q).T
    q, s = awq_core.quantize_weight(transposed, stats.mean, how)
    return (qarray.dequantize(q) / s).T


_by_qwix = jax.jit(by_qwix, static_argnums=(1, 2, 3))


def with_qwix(
    model: CausalLM, method: Method, bits: int, *, group: int | None = None, calibration: Calibration | None = None
) -> CausalLM:
    """The model with the matrices that `jaxinf.compression.quantize` would take, each rounded by qwix.

    Layers are taken one by one, each with the inputs that the rounded ones before it give. Of a mixture every
    expert is rounded with the tokens that it serves.
    """
    targets = plan(model, OURS[method, bits], group=group)
    walk, hidden = Walk(model), _hidden(model, method, calibration)
    for i in range(model.spec.depth):
        block, at = walk.block(i), f"layers.{i}."
        stats = statistics(block, hidden, gram=True) if method != "nearest" else {}
        new = with_weights(block, _all_rounded(weights_of(block), targets, at, method, bits, stats))
        walk.put(i, new)
        hidden = [np.asarray(run(new, jnp.asarray(x))[0]) for x in hidden]
    return walk.finished()


def compare(
    model: CausalLM, method: Method, bits: int, *, calibration: Calibration, group: int | None = None
) -> Iterator[Error]:
    """Matrix by matrix: equal weights, equal inputs (those of the model as it is), equal bits."""
    targets = plan(model, OURS[method, bits], group=group)
    walk, hidden = Walk(model), _hidden(model, "gptq", calibration)
    for i in range(model.spec.depth):
        block, at = walk.block(i), f"layers.{i}."
        weights, stats = weights_of(block), statistics(block, hidden, gram=True)
        theirs = _all_rounded(weights, targets, at, method, bits, stats)
        ours = _ours(block, weights, hidden, targets, at)
        for name, value in ours.items():
            w, gram = weights[name].astype(jnp.float32), stats[name].gram
            assert gram is not None
            whole = jnp.sum(errors(jnp.zeros_like(w), w, gram))
            found = [float(jnp.sum(errors(w, each, gram)) / whole) for each in (value, theirs[name])]
            yield Error(f"{at}{name}", *found)
        hidden = [np.asarray(run(block, jnp.asarray(x))[0]) for x in hidden]


def _ours(block: Block, weights: Weights, hidden, targets, at: str) -> dict[str, jax.Array]:
    """Our matrices as the floats that they stand for, scales that were folded into others taken back."""
    settings = Settings()
    easier, stats = folded(block, hidden, targets, at=at, settings=settings)
    found = {}
    for name, q in rounded(easier, stats, targets, at=at, settings=settings).items():
        if isinstance(q, QTensor):
            w = weights[name].astype(jnp.float32)
            found[name] = q.dequantize() * jnp.where(w == 0, 1, w / jnp.where(w == 0, 1, easier[name]))
    return found


def _hidden(model: CausalLM, method: Method, calibration: Calibration | None) -> list[np.ndarray]:
    if method == "nearest":
        return []
    assert calibration is not None
    return calibration.fitted(model.spec, 1).hidden(model)


def _all_rounded(
    weights: Mapping[str, Any],
    targets: Mapping[str, Target | None],
    at: str,
    method: Method,
    bits: int,
    stats: Mapping[str, Stats],
) -> dict[str, Any]:
    new = dict(weights)
    for name, w in weights.items():
        target = targets.get(f"{at}{name}")
        if target is None:
            continue
        own = stats.get(name)
        if w.ndim == 2:
            new[name] = _by_qwix(w, method, bits, target.group, own)
        else:
            parts = [None if own is None else jax.tree.map(lambda x, e=e: x[e], own) for e in range(len(w))]
            new[name] = jnp.stack(
                [_by_qwix(w[e], method, bits, target.group, part) for e, part in enumerate(parts)]
            )
    return new
