"""Arrays that are made out of stored tensors when they are read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.packing import unpack
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import TensorInfo, Tensors
from pallas_kernels.errors import CheckpointError, UnsupportedError

_BESIDE = 1 << 26
"""Bytes that are kept beside the largest array that was made: of one matrix several parameters may be cut."""


@dataclass(frozen=True)
class Array:
    """An array that `make` makes: known by shape before."""

    dtype: Any
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@dataclass
class Decoding:
    """What becomes of the stored tensors.

    arrays: by name, instead of the tensors `used`; all others stay.
    """

    quantization: Quantization
    arrays: dict[str, Array] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def matrix(self, name: str, used: Iterable[str], **arrays: Array | None) -> None:
        """A matrix's arrays, by field of `QTensor`."""
        self.arrays |= {f"{name}.{key}": array for key, array in arrays.items() if array is not None}
        self.used |= set(used)


class Decoded(Tensors):
    """Stored tensors and arrays made of them; the latest that were made are kept."""

    def __init__(self, source: Tensors, decoding: Decoding):
        infos = {name: info for name, info in source.items() if name not in decoding.used}
        for name, array in decoding.arrays.items():
            infos[name] = TensorInfo(Path(), np.dtype(array.dtype), array.shape, 0)
        super().__init__(infos)
        self._source, self._arrays = source, decoding.arrays
        self._made: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            return self._source.read(name)
        with self._lock:
            if name not in self._made:
                made, array = self._arrays[name].make(), self._arrays[name]
                assert made.shape == array.shape, f"{name}: {made.shape}, {array.shape} was announced"
                self._made[name] = made.astype(array.dtype, copy=False)
                sizes = [array.nbytes for array in self._made.values()]
                while sum(sizes) > max(sizes) + _BESIDE:
                    self._made.popitem(last=False)
                    sizes.pop(0)
            return self._made[name]

    def expect(self, name: str, view: np.ndarray) -> None:
        if name not in self._arrays:
            self._source.expect(name, view)


def modules(tensors: Tensors, ending: str) -> list[str]:
    """Names of the modules that have a tensor with this ending."""
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending)]


def need(tensors: Tensors, name: str, dims: int | None = None) -> TensorInfo:
    """What is known of a tensor that a quantised module must have.

    Raises:
      CheckpointError: it is not there, or has not so many dimensions.
    """
    if name not in tensors:
        raise CheckpointError(f"a quantised module has no {name}; the checkpoint is not whole")
    if dims is not None and len(tensors[name].shape) != dims:
        raise CheckpointError(f"{name} {list(tensors[name].shape)} must have {dims} dimensions")
    return tensors[name]


def expect_shape(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if got != want:
        raise CheckpointError(f"{name} has shape {list(got)}, where its module needs {list(want)}")


def codes_of_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 `[..., W]` -> uint8 `[..., W * 32 / bits]`: the codes in each word, low bits first."""
    parts = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return parts
    if bits == 2:
        return unpack(parts, "int2", parts.shape[-1] * 4).view(np.uint8) & 3
    return unpack(parts, "uint4", parts.shape[-1] * 2).view(np.uint8)


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes 0, 1, ... less half their number, in the dtype of so many bits."""
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(code_dtype(bits))


def code_dtype(bits: int) -> Any:
    """
    Raises:
      UnsupportedError: no dtype has so many bits.
    """
    found = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}.get(bits)
    if found is None:
        raise UnsupportedError(f"weights of {bits} bits are not read; those of 2, 4 and 8 are")
    return found


def in_order(groups: np.ndarray, count: int, at: str) -> np.ndarray:
    """From the group of every input channel, int `[K]`, the channels by group: int32 `[K]`.

    Raises:
      CheckpointError: the groups are not of one size.
    """
    sizes = np.bincount(groups, minlength=count) if groups.size and groups.min() >= 0 else np.zeros(1)
    if len(sizes) != count or len(set(sizes.tolist())) != 1:
        raise CheckpointError(f"{at} has groups of different sizes, where {count} of one size are known")
    return np.argsort(groups, kind="stable").astype(np.int32)
