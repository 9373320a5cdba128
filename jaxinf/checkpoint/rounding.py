"""Matrices rounded to the nearest while they are read: the host never has a whole model in two forms."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinf.checkpoint.parameters import Planned, Slot, arrays_of
from jaxinf.models import CausalLM
from jaxinf.quant import FORMATS, QTensor, format_of
from jaxinf.quant.qtensor import Activations
from pallas_kernels.errors import InputError
from sharding.placement import Index, Read

SCHEMES = (*FORMATS, "w8a8")
"""What needs no text to look at: every format, and int8 with inputs rounded to bytes."""
CALIBRATED = ("smoothquant", "llm-int8", "awq", "gptq")
_BLOCK = 1 << 22
"""Entries of a matrix that are rounded at a time, where its columns are independent."""
_KEPT = 1 << 27
"""Bytes of scales and the like that are kept until they are asked for."""


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded.

    format: a name in `jaxinf.quant.FORMATS`. group: rows that share a scale; None: as the format has it.
    activations: "int8": its inputs are rounded to bytes too.
    """

    format: str
    group: int | None = None
    activations: Activations | None = None

    @classmethod
    def of(cls, scheme: str) -> Rounding:
        """
        Raises:
          InputError: an unknown scheme; lists those that there are.
        """
        if scheme in CALIBRATED:
            raise InputError(
                f"quantize={scheme!r} is calibrated with text, so it is not done while loading: load what "
                f"`jaxinf quantize SRC DST --scheme {scheme} --calibration FILE` writes, or take one of "
                f"{', '.join(SCHEMES)}"
            )
        if scheme not in SCHEMES:
            raise InputError(f"quantize={scheme!r} must be one of {', '.join(SCHEMES)}")
        return cls("int8", activations="int8") if scheme == "w8a8" else cls(scheme)

    @property
    def by_column(self) -> bool:
        """Whether columns are rounded independently of each other."""
        return format_of(self.format).grouped

    def __call__(self, w: jax.Array) -> QTensor:
        return dataclasses.replace(format_of(self.format)(w, self.group), activations=self.activations)


Rules = Callable[[str], Rounding | None]
"""From a parameter's name to how it is rounded; None: it keeps its precision."""


def rounded(model: CausalLM, plan: Sequence[Planned], rules: Rules) -> tuple[CausalLM, list[Planned]]:
    """The abstract model with its quantisable matrices as `QTensor`s, and a plan that rounds what `plan` reads.

    Raises:
      InputError: a group that does not divide; or layers of one stack that are to be rounded in different ways.
    """
    graph, state = nnx.split(model)
    flat, out, kept = [], [], _Kept()
    for (slot, read), (path, variable) in zip(plan, nnx.to_flat_state(state), strict=True):
        how = _agreed(slot, rules) if variable.get_metadata().get("quantizable", False) else None
        if how is None:
            out.append((slot, read))
        else:
            value = _abstract(slot, how)
            variable = variable.replace(value)
            matrix = _Matrix(slot, read, how, kept)
            for array in arrays_of(dataclasses.replace(slot, value=value)):
                out.append((array, functools.partial(matrix.read, array.field or "values")))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat)), out


def _agreed(slot: Slot, rules: Rules) -> Rounding | None:
    found = {rules(name) for name in slot.names}
    if len(found) > 1:
        raise InputError(
            f"{slot.names[0]} and the layers stacked with it are to be rounded in different ways; load the model "
            'with layout="list", or make them the same'
        )
    return found.pop()


def _abstract(slot: Slot, how: Rounding) -> QTensor:
    try:
        return jax.eval_shape(how, slot.value)
    except InputError as e:
        raise InputError(f"{slot.names[0]}: {e}") from None


class _Kept:
    """What was rounded and not yet asked for: the codes of the latest part, scales and the like of several."""

    def __init__(self):
        self.lock = threading.Lock()
        self._small: OrderedDict[Any, dict[str, np.ndarray]] = OrderedDict()
        self._latest: tuple[Any, np.ndarray] | None = None
        self._bytes = 0

    def put(self, key: Any, arrays: dict[str, np.ndarray]) -> None:
        self._latest = key, arrays["values"]
        small = {name: array for name, array in arrays.items() if name != "values"}
        self._bytes += sum(a.nbytes for a in small.values()) - self._size(self._small.pop(key, {}))
        self._small[key] = small
        while self._bytes > _KEPT and len(self._small) > 1:
            self._bytes -= self._size(self._small.popitem(last=False)[1])

    def get(self, key: Any, field: str) -> np.ndarray | None:
        if field == "values":
            return self._latest[1] if self._latest is not None and self._latest[0] == key else None
        return self._small.get(key, {}).get(field)

    @staticmethod
    def _size(arrays: dict[str, np.ndarray]) -> int:
        return sum(a.nbytes for a in arrays.values())


class _Matrix:
    """A parameter `[..., K, N]`, rounded matrix by matrix when its arrays are read."""

    def __init__(self, slot: Slot, read: Read, how: Rounding, kept: _Kept):
        self._shape, self._read, self._how, self._kept = tuple(slot.value.shape), read, how, kept
        self._key = slot.path

    def read(self, field: str, index: Index) -> np.ndarray:
        """Of one array what lies at `index`. For values of a column its other rows are read too."""
        lead = len(self._shape) - 2
        counts = tuple(s.stop - s.start for s in index[:lead])
        columns, inside = slice(0, self._shape[-1]), index[lead:]
        if self._how.by_column:
            if field == "codebook":
                return np.broadcast_to(self._constant()[inside], (*counts, inside[0].stop - inside[0].start))
            columns, inside = inside[-1], (*inside[:-1], slice(0, inside[-1].stop - inside[-1].start))
        places = list(itertools.product(*(range(s.start, s.stop) for s in index[:lead])))
        if len(places) == 1:
            part = self._part(field, places[0], columns)[inside]
            return part.reshape(*counts, *part.shape)
        out = None
        for i, place in enumerate(places):
            part = self._part(field, place, columns)[inside]
            out = np.empty((len(places), *part.shape), part.dtype) if out is None else out
            out[i] = part
        assert out is not None
        return out.reshape(*counts, *out.shape[1:])

    def _constant(self) -> np.ndarray:
        rows = format_of(self._how.format).group(self._shape[-2], self._how.group)
        codebook = _encode(np.zeros((rows, 1), np.float32), self._how).codebook
        return np.asarray(codebook)

    def _part(self, field: str, place: tuple[int, ...], columns: slice) -> np.ndarray:
        key = self._key, place, columns.start, columns.stop
        with self._kept.lock:
            found = self._kept.get(key, field)
            if found is None:
                arrays = self._round(place, columns)
                self._kept.put(key, arrays)
                found = arrays[field]
        return found

    def _round(self, place: tuple[int, ...], columns: slice) -> dict[str, np.ndarray]:
        """All arrays of the columns of one matrix."""
        rows = slice(0, self._shape[-2])
        out: dict[str, np.ndarray] = {}
        wide = columns.stop - columns.start
        for block in self._blocks(columns):
            index = (*(slice(i, i + 1) for i in place), rows, block)
            w = self._read(index)
            q = _encode(w.reshape(w.shape[-2:]), self._how)
            for name, array in _arrays(q):
                if name == "codebook" or block == columns:
                    out[name] = array
                else:
                    if name not in out:
                        out[name] = np.empty((*array.shape[:-1], wide), array.dtype)
                    out[name][..., block.start - columns.start : block.stop - columns.start] = array
        return out

    def _blocks(self, columns: slice) -> Iterator[slice]:
        wide = columns.stop - columns.start
        step = max(128, _BLOCK // self._shape[-2] // 128 * 128) if self._how.by_column else wide
        for start in range(columns.start, columns.stop, step):
            yield slice(start, min(start + step, columns.stop))


def _arrays(q: QTensor) -> Iterator[tuple[str, np.ndarray]]:
    for field in dataclasses.fields(q):
        value = getattr(q, field.name)
        if isinstance(value, jax.Array):
            yield field.name, np.asarray(value)


def _encode(w: np.ndarray, how: Rounding) -> QTensor:
    """On the host's CPU, whatever the device is."""
    device = host()
    with jax.default_device(device):
        return _encoded(jax.device_put(w, device), how)


@functools.partial(jax.jit, static_argnums=1)
def _encoded(w: jax.Array, how: Rounding) -> QTensor:
    return how(w)


@functools.cache
def host() -> Any:
    """The CPU, or where JAX was told to have none the first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
