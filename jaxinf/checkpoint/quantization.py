"""What a checkpoint says of its quantised matrices, and the model that it then holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.checkpoint.parameters import Slot, Source, parameter_slots, viewed_shape
from jaxinf.checkpoint.tensors import TensorInfo, Tensors
from jaxinf.models import CausalLM
from jaxinf.quant import FIELDS, FORMATS, QTensor
from pallas_kernels.errors import CheckpointError, UnsupportedError
from sharding.placement import Index

VERSION = 1
KEY = "quantization"
METHODS = ("w8a8", "llm-int8", "smoothquant", "awq", "gptq", "qat", "b1.58", "mixed")
"""Schemes beside the formats. "mixed": several formats in one model."""
FORMAT_OF = {
    **dict.fromkeys(("w8a8", "llm-int8", "smoothquant", "mixed"), "int8"),
    **dict.fromkeys(("awq", "gptq", "qat"), "int4"),
    "b1.58": "ternary",
}
"""The format that a method rounds to, where it does not say which."""
KNOWN = (*FORMATS, *METHODS)


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a checkpoint are quantised.

    scheme: of `KNOWN`; it is told, what counts is what is stored.
    activations: "int8": inputs of all quantised matrices are rounded to bytes; names of parameters: of those.
    """

    scheme: str
    activations: str | tuple[str, ...] | None = None

    def rounds_inputs(self, parameter: str) -> bool:
        return self.activations == "int8" or parameter in (self.activations or ())

    def record(self) -> dict[str, Any]:
        """As `config.json` has it."""
        some = list(self.activations) if isinstance(self.activations, tuple) else self.activations
        return {"version": VERSION, "scheme": self.scheme, "activations": some}


def read(config: dict[str, Any], at: Path) -> Quantization | None:
    """What a `config.json` of this project's form says.

    Raises:
      CheckpointError: a version, scheme or key that this build does not know.
    """
    found = config.get(KEY)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = json.dumps(found.get("version") if isinstance(found, dict) else found)
        raise CheckpointError(f"{at}: {KEY} is version {version}; this build reads {VERSION}, so take a newer one")
    if found.get("scheme") not in KNOWN:
        raise CheckpointError(
            f"{at}: {KEY} names the scheme {found.get('scheme')!r}, which this build does not know; it knows "
            f"{', '.join(KNOWN)}"
        )
    if unknown := sorted(set(found) - {"version", "scheme", "activations"}):
        raise CheckpointError(f"{at}: {KEY} has keys that are not understood: {', '.join(unknown)}")
    some = found.get("activations")
    if isinstance(some, list) and all(isinstance(name, str) for name in some):
        return Quantization(found["scheme"], tuple(some))
    if some not in (None, "int8"):
        raise CheckpointError(f'{at}: {KEY} has activations={some!r}; null, "int8" or parameters are known')
    return Quantization(found["scheme"], some)


def told_by(model: CausalLM, scheme: str | None = None) -> Quantization | None:
    """How a model in memory is quantised; None: it is not. scheme: what to call it, else its format."""
    found = [(slot, slot.value) for slot in parameter_slots(model) if isinstance(slot.value, QTensor)]
    if not found:
        return None
    schemes = {_format(value) for _, value in found}
    rounding = [name for slot, value in found if value.activations for name in slot.names]
    every = len(rounding) == sum(len(slot.names) for slot, _ in found)
    activations = "int8" if every else tuple(sorted(rounding)) or None
    return Quantization(scheme or (schemes.pop() if len(schemes) == 1 else "mixed"), activations)


def _format(q: QTensor) -> str:
    kind = jnp.dtype(q.values.dtype).name
    if q.codebook is not None:
        if kind == "uint8":
            return "kmeans8"
        return "mxfp4" if q.scales.dtype == jnp.float8_e8m0fnu else "nf4" if q.groups > 1 else "kmeans4"
    if kind == "int8":
        return "llm-int8" if q.rows is not None else "w8a8" if q.activations else "int8"
    return {"int4": "int4", "int2": "ternary", "float8_e5m2": "fp8_e5m2"}.get(kind, "fp8_e4m3")


def as_stored(
    model: CausalLM, tensors: Tensors, source: Callable[[str], Source], quantization: Quantization, at: str
) -> CausalLM:
    """The abstract model with a `QTensor` for every parameter whose codes are stored.

    Raises:
      CheckpointError: codes without scales, or of what is no matrix.
      UnsupportedError: layers of one stack are quantised in different ways.
    """
    graph, state = nnx.split(model)
    flat = []
    for slot, (path, variable) in zip(parameter_slots(model), nnx.to_flat_state(state), strict=True):
        stored = [dict(_fields(name, tensors, source)) for name in slot.names]
        if any(stored):
            _check(slot, stored, at)
            given = {f: _joined(slot, [s[f] for s in stored]) for f in stored[0]}
            rounds = quantization.rounds_inputs(slot.names[0])
            variable = variable.replace(QTensor(**given, activations="int8" if rounds else None))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _fields(name: str, tensors: Tensors, source: Callable[[str], Source]) -> Iterator[tuple[str, Any]]:
    """The stored arrays of a parameter as they are seen: `(field, shape and dtype)`."""
    for field in FIELDS:
        where = source(f"{name}.{field}")
        if where.names[0] in tensors:
            info = tensors[where.names[0]]
            shape = viewed_shape(where, info.shape) or info.shape
            yield field, jax.ShapeDtypeStruct((len(where.names), *shape) if where.several else shape, info.dtype)


class Evened(Tensors):
    """Stored tensors; layers that keep fewer rows wide than others of their stack have unused ones besides.

    Only of this project's own form, where a parameter's arrays lie under its own name.
    """

    def __init__(self, source: Tensors, model: CausalLM):
        infos, self._source, self._padded = dict(source), source, set()
        for slot in parameter_slots(model):
            found = [source.get(f"{name}.outliers") for name in slot.names]
            some = next((info for info in found if info is not None), None)
            if not slot.stacked or some is None:
                continue
            most = max(info.shape[-2] for info in found if info is not None)
            for name in slot.names:
                lead, columns = some.shape[:-2], some.shape[-1]
                shapes = {"outliers": (*lead, most, columns), "rows": (*lead, most)}
                for field, shape in shapes.items():
                    dtype = some.dtype if field == "outliers" else np.dtype(np.int32)
                    if getattr(source.get(f"{name}.{field}"), "shape", None) != shape:
                        infos[f"{name}.{field}"] = TensorInfo(some.file, dtype, shape, 0)
                        self._padded.add(f"{name}.{field}")
        super().__init__(infos)

    def read(self, name: str) -> np.ndarray:
        if name not in self._padded:
            return self._source.read(name)
        info = self[name]
        out = np.full(info.shape, -1 if name.endswith(".rows") else 0, info.dtype)
        if name in self._source:
            kept = self._source.read(name)
            out[tuple(slice(0, n) for n in kept.shape)] = kept
        return out

    def part(self, name: str, index: Index) -> np.ndarray:
        return self.read(name)[index] if name in self._padded else self._source.part(name, index)


def _check(slot: Slot, stored: Sequence[dict[str, Any]], at: str) -> None:
    name = slot.names[0]
    if not {"values", "scales"} <= set(stored[0]):
        kept = ", ".join(stored[0]) or "nothing"
        raise CheckpointError(f"{at} keeps of {name} {kept}, where a quantised matrix has values and scales")
    if name.endswith(".table") or len(slot.value.shape) - slot.stacked < 2:
        raise UnsupportedError(f"{at} keeps {name} quantised, which is not read; take another checkpoint")
    for other, fields in zip(slot.names[1:], stored[1:], strict=True):
        if fields != stored[0]:
            raise UnsupportedError(
                f"{at} keeps {name} and {other} quantised in different ways, so they are no stack; take "
                'layout="list"'
            )


def _joined(slot: Slot, arrays: Sequence[Any]) -> Any:
    shape = arrays[0].shape
    return jax.ShapeDtypeStruct((len(arrays), *shape) if slot.stacked else shape, arrays[0].dtype)
