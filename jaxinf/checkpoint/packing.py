"""Arrays whose dtypes files do not have: as bytes, under a name that says what they are.

    x.values.int4             two codes a byte along the last axis, low bits first; the last byte is filled with 0
    x.values.int2             four a byte
    x.scales.float8_e8m0fnu   as they are

Of packed codes the last axis is as long as that of `x.scales`.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.tensors import Pending, TensorInfo, Tensors
from pallas_kernels.errors import CheckpointError
from sharding.placement import Index

_BITS = {"int4": 4, "uint4": 4, "int2": 2, "float8_e8m0fnu": 8}
"""Bits of an entry of each dtype that is renamed."""


def pack(x: np.ndarray) -> np.ndarray:
    """`[..., N]` of a dtype of 4, 2 or 8 bits -> uint8 `[..., N / entries a byte, rounded up]`."""
    bits = _BITS[x.dtype.name]
    each = 8 // bits
    codes = x.view(np.uint8)
    if each == 1:
        return codes
    if short := -x.shape[-1] % each:
        codes = np.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    out = codes[..., ::each] & (2**bits - 1)
    for i in range(1, each):
        out |= codes[..., i::each] << (bits * i)
    return out


def unpack(packed: np.ndarray, dtype: str, length: int) -> np.ndarray:
    """uint8 `[..., bytes]` -> the first `length` entries of each row, of the dtype."""
    bits = _BITS[dtype]
    each = 8 // bits
    if each == 1:
        return packed.view(jnp.dtype(dtype))
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * each), np.uint8)
    for i in range(each):
        codes[..., i::each] = (packed >> (bits * i)) & (2**bits - 1)
    codes = codes[..., :length]
    if dtype.startswith("int"):  # two's complement: the upper bits repeat the sign
        half = np.uint8(2 ** (bits - 1))
        return ((codes ^ half) - half).view(np.int8).astype(jnp.dtype(dtype))
    return codes.astype(jnp.dtype(dtype))


def stored(tensor: Pending) -> Pending:
    """As it is written."""
    name = tensor.dtype.name
    if name not in _BITS:
        return tensor
    *lead, last = tensor.shape
    shape = (*lead, -(-last * _BITS[name] // 8))
    return Pending(f"{tensor.name}.{name}", np.dtype(np.uint8), shape, lambda: pack(tensor.value()))


class Unpacked(Tensors):
    """Tensors as they were before `stored`.

    Raises:
      CheckpointError: a packed tensor's last axis does not fit that of its scales.
    """

    def __init__(self, source: Tensors):
        self._source = source
        self._names: dict[str, tuple[str, str | None]] = {}
        infos = {}
        for stored_name, info in source.items():
            name, _, dtype = stored_name.rpartition(".")
            if dtype not in _BITS or info.dtype != np.uint8:
                self._names[stored_name] = stored_name, None
                infos[stored_name] = info
                continue
            self._names[name] = stored_name, dtype
            infos[name] = replace(info, dtype=jnp.dtype(dtype), shape=self._shape(stored_name, info, dtype))
        super().__init__(infos)

    def _shape(self, name: str, info: TensorInfo, dtype: str) -> tuple[int, ...]:
        if _BITS[dtype] == 8:
            return info.shape
        parameter = name.removesuffix(f".values.{dtype}")
        scales = next((s for s in _names_of_scales(parameter) if s in self._source), None)
        length = 0 if scales is None or not info.shape else self._source[scales].shape[-1]
        if scales is None or not info.shape or -(-length * _BITS[dtype] // 8) != info.shape[-1]:
            raise CheckpointError(
                f"{name} {list(info.shape)} is not packed as {parameter}.scales says; the checkpoint is damaged"
            )
        return (*info.shape[:-1], length)

    def read(self, name: str) -> np.ndarray:
        stored_name, dtype = self._names[name]
        values = self._source.read(stored_name)
        return values if dtype is None else unpack(values, dtype, self[name].shape[-1])

    def part(self, name: str, index: Index) -> np.ndarray:
        stored_name, dtype = self._names[name]
        if dtype is None:
            return self._source.part(name, index)
        *lead, last = index
        each = 8 // _BITS[dtype]
        start = last.start // each
        packed = self._source.part(stored_name, (*lead, slice(start, -(-last.stop // each))))
        return unpack(packed, dtype, last.stop - start * each)[..., last.start - start * each :]

    def expect(self, name: str, view: np.ndarray) -> None:
        if self._names[name][1] is None:
            self._source.expect(name, view)


def _names_of_scales(parameter: str) -> list[str]:
    return [f"{parameter}.scales", f"{parameter}.scales.float8_e8m0fnu"]
