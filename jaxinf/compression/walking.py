"""A model's layers one by one, whatever its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.layers import Block
from jaxinf.models import CausalLM
from jaxinf.models.causal_lm import stack
from jaxinf.quant import QTensor


class Walk:
    """Takes the blocks out of a model and puts others in their place; the model given stays as it is."""

    def __init__(self, model: CausalLM):
        graph, state = nnx.split(model)
        self._model: CausalLM = nnx.merge(graph, state)
        self._new: dict[tuple[int, int], list[Block]] = {}

    def _place(self, layer: int) -> tuple[int, int, int | None]:
        """Of a layer: its segment, its place in `blocks`, and in the stack there."""
        for i, segment in enumerate(self._model.spec.segments):
            if layer < segment.layers:
                if self._model.layout == "list":
                    return i, layer, None
                return i, layer % len(segment.period), layer // len(segment.period)
            layer -= segment.layers
        raise IndexError(layer)

    def block(self, layer: int) -> Block:
        """Layer number `layer` by itself."""
        segment, at, entry = self._place(layer)
        block = self._model.segments[segment].blocks[at]
        graph, state = nnx.split(block)
        return nnx.merge(graph, state if entry is None else jax.tree.map(lambda x: x[entry], state))

    def put(self, layer: int, block: Block) -> None:
        """Puts a block in the place of a layer, or of a stack once all of its layers are there; in their order."""
        segment, at, entry = self._place(layer)
        blocks = self._model.segments[segment].blocks
        if entry is None:
            blocks[at] = block
            return
        row = self._new.setdefault((segment, at), [])
        row.append(block)
        if len(row) == self._model.spec.segments[segment].repeats:
            blocks[at] = stack(_alike(self._new.pop((segment, at))))

    def finished(self) -> CausalLM:
        return self._model


def _alike(blocks: Sequence[Block]) -> list[Block]:
    """Blocks whose matrices keep as many rows wide as the one that keeps most."""
    flats = [nnx.to_flat_state(nnx.state(block)) for block in blocks]
    graph = nnx.graphdef(blocks[0])
    padded: list[list[Any]] = [[] for _ in blocks]
    for row in zip(*flats, strict=True):
        values = [variable.get_value() for _, variable in row]
        most = max((v.rows.shape[-1] for v in values if isinstance(v, QTensor) and v.rows is not None), default=0)
        for flat, (path, variable), value in zip(padded, row, values, strict=True):
            flat.append((path, variable.replace(wider(value, most) if most else value)))
    return [nnx.merge(graph, nnx.from_flat_state(flat)) for flat in padded]


def wider(q: QTensor, rows: int) -> QTensor:
    """The same matrix with room for so many rows kept wide."""
    more = rows - q.rows.shape[-1]
    pad = [(0, 0)] * (q.rows.ndim - 1)
    return dataclasses.replace(
        q,
        rows=jnp.pad(q.rows, [*pad, (0, more)], constant_values=-1),
        outliers=jnp.pad(q.outliers, [*pad, (0, more), (0, 0)]),
    )
