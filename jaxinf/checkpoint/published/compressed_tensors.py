"""Weights of compressed-tensors (llm-compressor): `quant_method: compressed-tensors`.

    int-quantized    weight int8 [out, in]
    float-quantized  weight float8_e4m3fn [out, in]
    pack-quantized   weight_packed int32 [out, in * bits / 32], codes plus half their number, low bits first;
                     weight_shape int64 [2]: out, in
    each with        weight_scale [1], [out, 1] or [out, groups]      w = (q - z) * s
    and perhaps      weight_zero_point int8 like the scales; packed: int32 [out * bits / 32, groups]
                     weight_g_idx int32 [in]: the group of each input channel (`actorder: group`)

`config_groups` says which modules have which bits, and whether inputs are rounded to bytes, token by token
(neuralmagic/compressed-tensors, src/compressed_tensors/compressors and quantization/quant_args.py). Inputs that are
to be rounded to 8-bit floats keep their precision here, which is nearer to the original.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.published.decoded import (
    Array,
    Decoding,
    code_dtype,
    codes_of_words,
    expect_shape,
    in_order,
    modules,
    need,
    signed,
)
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import Tensors
from pallas_kernels.errors import CheckpointError

_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
_BESIDE = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale")
"""Fixed scales of inputs and caches, which are rounded otherwise here, or not at all."""


@dataclass(frozen=True)
class _Group:
    """What holds for some modules. targets: names of modules, patterns after "re:", or classes of modules."""

    targets: tuple[str, ...]
    bits: int
    integer: bool
    symmetric: bool
    rounds_inputs: bool

    def meets(self, module: str) -> bool:
        return any(
            re.match(target[3:], module) is not None if target.startswith("re:") else target in (module, "Linear")
            for target in self.targets
        )


def read(section: Config, tensors: Tensors) -> Decoding:
    form = section.str("format", default=_FORMATS[0])
    if form not in _FORMATS:
        raise section.refuse("format", f"is not read; {', '.join(_FORMATS)} are")
    section.only("transform_config", None, {})  # rotations of what flows between the layers
    if section.object("sparsity_config").get("format", "dense") != "dense":
        raise section.refuse("sparsity_config", "is not read; take a checkpoint that keeps its zeros")
    groups = [_group(section.section("config_groups").section(name)) for name in _names(section)]
    rounding = {group.rounds_inputs for group in groups}
    if len(rounding) > 1:
        raise section.refuse("config_groups", "rounds the inputs of some modules alone, which is not read")
    kinds = {(group.integer, group.bits) for group in groups}
    scheme = {(True, 8): "int8", (True, 4): "int4", (False, 8): "fp8_e4m3"}.get(kinds.pop(), "mixed")
    rounds = rounding == {True}
    scheme = "w8a8" if rounds and scheme == "int8" else scheme
    out = Decoding(Quantization("mixed" if kinds else scheme, "int8" if rounds else None))
    for at in modules(tensors, ".weight_scale"):
        group = next((group for group in groups if group.meets(at)), None)
        if group is None:
            raise CheckpointError(f"{at}.weight_scale is there, but no group of quantization_config targets {at}")
        _module(out, tensors, at, group)
    out.used |= {name for name in tensors if name.rpartition(".")[2] in _BESIDE}
    return out


def _names(section: Config) -> list[str]:
    groups: Mapping[str, Any] = section.object("config_groups")
    if not groups:
        raise section.refuse("config_groups", "must name at least one group")
    return list(groups)


def _group(section: Config) -> _Group:
    weights = section.section("weights")
    kind, bits = weights.str("type", default="int"), weights.int("num_bits")
    weights.only("type", "int", "float")
    if kind == "float":
        weights.only("num_bits", 8)
    weights.only("strategy", None, "channel", "group", "tensor")
    section.only("output_activations", None)
    rounds = False
    if "input_activations" in section:
        inputs = section.section("input_activations")
        if kind == "int":
            inputs.only("type", "int")
            inputs.only("num_bits", 8)
            inputs.only("dynamic", True)
            inputs.only("symmetric", True)
            inputs.only("strategy", "token", None)
            rounds = True
    targets = tuple(section.list("targets", str, default=["Linear"]))
    return _Group(targets, bits, kind == "int", weights.bool("symmetric", default=True), rounds)


def _module(out: Decoding, tensors: Tensors, at: str, group: _Group) -> None:
    weight, packed, scale, zero, order = (
        f"{at}.{name}" for name in ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    )
    if packed in tensors:
        dtype = code_dtype(group.bits)
        expect_shape(f"{at}.weight_shape", need(tensors, f"{at}.weight_shape").shape, (2,))
        rows, columns = map(int, tensors.read(f"{at}.weight_shape"))
        words = math.ceil(columns * group.bits / 32)
        expect_shape(packed, tensors[packed].shape, (rows, words))

        def codes() -> np.ndarray:
            return signed(codes_of_words(tensors.read(packed), group.bits)[:, :columns], group.bits)

    else:
        rows, columns = need(tensors, weight, 2).shape
        dtype = tensors[weight].dtype
        if dtype != (np.int8 if group.integer else jnp.float8_e4m3fn):
            raise CheckpointError(f"{weight} is in {dtype}, which is not what quantization_config says")

        def codes() -> np.ndarray:
            return tensors.read(weight)

    shape = tensors[scale].shape
    groups = shape[1] if len(shape) == 2 else 1
    if shape not in ((), (1,), (1, 1), (rows,)):
        expect_shape(scale, shape, (rows, groups))
    if columns % groups:
        raise CheckpointError(f"{scale} has {groups} groups, which do not divide {columns} input channels")

    def by_group(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values.astype(np.float32).reshape(-1, groups), (rows, groups))

    def scales() -> np.ndarray:
        wide = by_group(tensors.read(scale))
        return wide[:, 0] if groups == 1 else wide

    def zeros() -> np.ndarray:
        stored = tensors.read(zero)
        if packed not in tensors:
            return by_group(stored)
        unpacked = codes_of_words(stored.T, group.bits)[:, :rows].T
        return unpacked.astype(np.float32) - 2 ** (group.bits - 1)

    def channels() -> np.ndarray:
        return in_order(tensors.read(order), groups, order)

    ordered = order in tensors
    if not group.symmetric:
        need(tensors, zero)
    out.matrix(
        weight,
        (weight, packed, scale, zero, order, f"{at}.weight_shape"),
        values=Array(dtype, (rows, columns), lambda: codes()[:, channels()] if ordered else codes()),
        scales=Array(np.float32, (rows,) if groups == 1 else (rows, groups), scales),
        zeros=None if group.symmetric else Array(np.float32, (rows, groups), zeros),
        order=Array(np.int32, (columns,), channels) if ordered else None,
    )
