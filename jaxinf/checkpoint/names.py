"""Where a family keeps its weights: tables from our modules to published tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxinf.checkpoint.parameters import Source, same
from jaxinf.checkpoint.tensors import Tensors
from jaxinf.layers import LayerSpec, MoESpec
from jaxinf.models import ModelSpec
from jaxinf.quant import FIELDS

Rows = Callable[[np.ndarray, LayerSpec], np.ndarray]
Count = Callable[[LayerSpec], int]

_SUFFIX = {"kernel": "weight", "scale": "weight", "table": "weight", "bias": "bias"}
_BY_CHANNEL = ("values", "scales", "zeros", "outliers")
"""Arrays of a quantised matrix that have its output channels."""
_BUFFERS = r"rotary_emb\.inv_freq|masked_bias"
"""Tensors that old files hold and that are no parameters."""


@dataclass(frozen=True)
class Part:
    """A module that is a part of a published one, or a stack of several.

    rows: picks the output channels out of `[out, ...]`.
    count: how many published modules ("{j}" in `module` counts them) are stacked along a new first axis.
    """

    module: str
    rows: Rows | None = None
    count: Count | None = None


@dataclass(frozen=True)
class Tensor:
    """A single parameter, stored under `name`; `view` takes it to our shape."""

    name: str
    view: Callable[[np.ndarray], np.ndarray] = lambda x: x
    count: Count | None = None


@dataclass(frozen=True)
class Names:
    """The weight names of a family.

    top: modules outside the layers; layer: those of layer {i}; both below one of `prefixes`.
    tensors: parameters of a layer that follow no module's pattern.
    head: the language-model head, below none of `prefixes`.
    transposed: matrices are stored [in, out] instead of [out, in].
    buffers: pattern of tensors that are no parameters.
    """

    layers: str
    top: Mapping[str, str]
    layer: Mapping[str, str | Part]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.", "")
    head: str = "lm_head"
    transposed: bool = False
    buffers: str = _BUFFERS

    def bind(self, spec: ModelSpec, tensors: Tensors) -> Bound:
        embed = self.top["embed"]
        there = [p for p in self.prefixes if f"{p}{embed}.weight" in tensors]
        return Bound(self, spec, (there or self.prefixes)[0])


class Bound:
    """`Names` for one checkpoint."""

    def __init__(self, names: Names, spec: ModelSpec, prefix: str):
        self._names, self._prefix = names, prefix
        self._layers = list(spec.layers())
        self._buffers = re.compile(rf"(^|\.)({names.buffers})$")
        self._tied_head = f"{self._head}.weight" if spec.tied else None

    @property
    def _head(self) -> str:
        return self._names.head

    def source(self, name: str) -> Source:
        """Where the parameter `name` lies, or an array of it where it is quantised.

        Those of a published matrix are seen as it is; each lies under the matrix's name with the field's behind it.
        """
        parameter, _, field = name.rpartition(".")
        if field in FIELDS:
            whole = self.source(parameter)
            view = whole.view if field in _BY_CHANNEL else same
            return Source(tuple(f"{stored}.{field}" for stored in whole.names), view, whole.several)
        names = self._names
        if not name.startswith("layers."):
            module, leaf = name.rsplit(".", 1)
            place = names.head if module == "head" else self._prefix + names.top[module]
            return self._module(place, leaf, None, None)
        _, number, rest = name.split(".", 2)
        at = self._prefix + names.layers.format(i=number)
        layer = self._layers[int(number)]
        if rest in names.tensors:
            tensor = names.tensors[rest]
            return Source(*_several(at + tensor.name, tensor.count, layer, tensor.view))
        module, leaf = rest.rsplit(".", 1)
        part = names.layer[module]
        part = Part(part) if isinstance(part, str) else part
        return self._module(at + part.module, leaf, part, layer)

    def ignorable(self, name: str) -> bool:
        """Whether a stored tensor is no parameter of ours: a buffer, or the head of a tied model."""
        return name == self._tied_head or self._buffers.search(name) is not None

    def _module(self, place: str, leaf: str, part: Part | None, layer: LayerSpec | None) -> Source:
        flip = leaf == "kernel"
        rows = None if part is None else part.rows
        stored_flipped = flip and self._names.transposed

        def view(x: np.ndarray) -> np.ndarray:
            x = x.T if stored_flipped else x
            x = x if rows is None else rows(x, layer)  # pyright: ignore[reportArgumentType]
            return x.T if flip else x

        count = None if part is None else part.count
        return Source(*_several(f"{place}.{_SUFFIX[leaf]}", count, layer, view))


def _several(name: str, count: Count | None, layer: LayerSpec | None, view):
    if count is None or layer is None:
        return (name,), view, False
    return tuple(name.format(j=j) for j in range(count(layer))), view, True


def experts(name: str) -> Tensor:
    """One published matrix `[out, in]` for each expert {j}."""
    return Tensor(name, np.transpose, _experts)


def _experts(layer: LayerSpec) -> int:
    assert isinstance(layer.ffn, MoESpec)
    return layer.ffn.experts


def query_heads(layer: LayerSpec) -> int:
    return layer.attention.heads


def key_heads(layer: LayerSpec) -> int:
    return layer.attention.kv_heads


def blocks(module: str) -> dict[str, Part]:
    """Queries, keys and values in one matrix, one after the other."""

    def cut(which: int) -> Rows:
        def rows(x: np.ndarray, layer: LayerSpec) -> np.ndarray:
            a = layer.attention
            q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
            if x.shape[0] != q + 2 * kv:
                raise ValueError(f"{x.shape[0]} rows, not {q + 2 * kv}")
            start = (0, q, q + kv)[which]
            return x[start : start + (q if which == 0 else kv)]

        return rows

    return {f"attention.{n}": Part(module, cut(i)) for i, n in enumerate(("query", "key", "value"))}


def grouped(module: str) -> dict[str, Part]:
    """Queries, keys and values in one matrix: for each key head its queries, then the key, then the value."""

    def cut(which: int) -> Rows:
        def rows(x: np.ndarray, layer: LayerSpec) -> np.ndarray:
            a = layer.attention
            group = a.heads // a.kv_heads
            x = x.reshape(a.kv_heads, group + 2, a.head_dim, *x.shape[1:])
            x = (x[:, :group], x[:, group], x[:, group + 1])[which]
            return x.reshape(-1, *x.shape[3 if which == 0 else 2 :])

        return rows

    return {f"attention.{n}": Part(module, cut(i)) for i, n in enumerate(("query", "key", "value"))}


def halves(module: str) -> dict[str, Part]:
    """Gate and up projections in one matrix, one after the other."""

    def cut(which: int) -> Rows:
        def rows(x: np.ndarray, layer: LayerSpec) -> np.ndarray:
            return x.reshape(2, -1, *x.shape[1:])[which]

        return rows

    return {f"ffn.{n}": Part(module, cut(i)) for i, n in enumerate(("gate", "up"))}
