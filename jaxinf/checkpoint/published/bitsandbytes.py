"""Weights of bitsandbytes, 8 bits (LLM.int8()) and 4 bits (NF4 or FP4): `quant_method: bitsandbytes`.

    weight int8 [out, in], SCB float32 [out]             w = q * SCB / 127
    weight uint8 [out * in / 2, 1]                       two codes a byte of the flattened matrix, high bits first
    weight.absmax float32 [out * in / blocksize]         w = quant_map[q] * absmax
    weight.quant_map float32 [16]
    weight.quant_state.bitsandbytes__nf4 uint8           JSON: blocksize, shape, and for nested absmax its offset
    weight.nested_absmax float32, nested_quant_map float32 [256]
        absmax (uint8) = nested_quant_map[.] * nested_absmax[of nested_blocksize] + nested_offset

(bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py: QuantState, and nn/modules.py.) The 8-bit inputs
of LLM.int8() depend on what the inputs are; here they keep their precision, which is nearer to the original.
"""

from __future__ import annotations

import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.packing import unpack
from jaxinf.checkpoint.published.decoded import Array, Decoding, expect_shape, modules, need
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import Tensors
from pallas_kernels.errors import CheckpointError, UnsupportedError

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def read(section: Config, tensors: Tensors) -> Decoding:
    nibbles = section.bool("load_in_4bit", "_load_in_4bit", default=False)
    out = Decoding(Quantization("nf4" if nibbles else "int8"))
    for at in modules(tensors, ".SCB"):
        _bytes(out, tensors, at)
    for ending in _STATES:
        for weight in modules(tensors, ending):
            _nibbles(out, tensors, weight, weight + ending)
    return out


def _bytes(out: Decoding, tensors: Tensors, at: str) -> None:
    weight, scales = f"{at}.weight", f"{at}.SCB"
    shape = need(tensors, weight, 2).shape
    expect_shape(scales, tensors[scales].shape, shape[:1])
    out.matrix(
        weight,
        (weight, scales, f"{at}.weight_format"),
        values=Array(np.int8, shape, lambda: tensors.read(weight)),
        scales=Array(np.float32, shape[:1], lambda: tensors.read(scales).astype(np.float32) / np.float32(127)),
    )


def _nibbles(out: Decoding, tensors: Tensors, weight: str, state: str) -> None:
    found = _state(tensors, state)
    shape, block = tuple(found["shape"]), found["blocksize"]
    if len(shape) != 2 or shape[1] % block:
        raise UnsupportedError(
            f"{weight} {list(shape)} has blocks of {block} entries that do not lie in one row each, which is not "
            "read; take the plain form of the checkpoint"
        )
    blocks = (shape[0], shape[1] // block)
    size = math.prod(need(tensors, weight).shape)
    if tensors[weight].dtype != np.uint8 or size != math.prod(shape) // 2:
        info = tensors[weight]
        raise CheckpointError(
            f"{weight} {list(info.shape)} in {info.dtype} does not hold {list(shape)} codes of 4 bits"
        )
    expect_shape(f"{weight}.absmax", need(tensors, f"{weight}.absmax").shape, (math.prod(blocks),))
    expect_shape(f"{weight}.quant_map", need(tensors, f"{weight}.quant_map").shape, (16,))

    def codes() -> np.ndarray:
        packed = tensors.read(weight).reshape(shape[0], -1)
        return unpack((packed >> 4) | (packed << 4), "uint4", shape[1])

    def scales() -> np.ndarray:
        wide = _absmax(tensors, weight, found).reshape(blocks)
        return wide[:, 0] if blocks[1] == 1 else wide

    nested = (f"{weight}.nested_absmax", f"{weight}.nested_quant_map")
    out.matrix(
        weight,
        (weight, state, f"{weight}.absmax", f"{weight}.quant_map", *nested),
        values=Array(jnp.uint4, shape, codes),
        scales=Array(np.float32, blocks[:1] if blocks[1] == 1 else blocks, scales),
        codebook=Array(np.float32, (16,), lambda: tensors.read(f"{weight}.quant_map")),
    )


def _state(tensors: Tensors, name: str) -> dict[str, Any]:
    try:
        found = json.loads(tensors.read(name).tobytes())
        good = all(isinstance(n, int) and n > 0 for n in (found["blocksize"], *found["shape"]))
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{name} does not say how its matrix is stored ({type(e).__name__})") from e
    if not good:
        raise CheckpointError(f"{name} holds sizes that are no sizes")
    return found


def _absmax(tensors: Tensors, weight: str, state: dict[str, Any]) -> np.ndarray:
    absmax = tensors.read(f"{weight}.absmax")
    if absmax.dtype != np.uint8:
        return absmax.astype(np.float32)
    names = [f"{weight}.{name}" for name in ("nested_absmax", "nested_quant_map")]
    for name in names:
        need(tensors, name, 1)
    of_blocks, table = (tensors.read(name).astype(np.float32) for name in names)
    each = np.repeat(of_blocks, state["nested_blocksize"])[: absmax.size]
    if each.size < absmax.size:
        raise CheckpointError(f"{names[0]} has {of_blocks.size} entries, too few for {absmax.size} scales")
    return table[absmax] * each + np.float32(state["nested_offset"])
