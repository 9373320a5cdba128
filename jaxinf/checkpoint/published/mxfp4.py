"""Experts in MXFP4 as GPT-OSS publishes them: `quant_method: mxfp4`.

    x_blocks uint8 [experts, out, in / 32, 16]   32 codes of 4 bits, two a byte, low bits first
    x_scales uint8 [experts, out, in / 32]       the exponent of two plus 127

stand for `x [experts, in, out]`; codes are the 4-bit floats of OCP Microscaling Formats 1.0
(openai/gpt-oss, gpt_oss/torch/weights.py).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.packing import unpack
from jaxinf.checkpoint.published.decoded import Array, Decoding, expect_shape, modules, need
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import Tensors
from jaxinf.quant.formats import E2M1


def read(section: Config, tensors: Tensors) -> Decoding:
    out = Decoding(Quantization("mxfp4"))
    for at in modules(tensors, "_blocks"):
        _matrices(out, tensors, at)
    return out


def _matrices(out: Decoding, tensors: Tensors, at: str) -> None:
    blocks, scales = f"{at}_blocks", f"{at}_scales"
    experts, columns, groups, each = need(tensors, blocks, 4).shape
    expect_shape(scales, need(tensors, scales).shape, (experts, columns, groups))
    inner = groups * each * 2

    def codes() -> np.ndarray:
        packed = tensors.read(blocks).reshape(experts, columns, groups * each)
        return unpack(packed, "uint4", inner).swapaxes(1, 2)

    def exponents() -> np.ndarray:
        found = tensors.read(scales).view(jnp.float8_e8m0fnu).swapaxes(1, 2)
        return found[:, 0] if groups == 1 else found

    lead = (experts, columns) if groups == 1 else (experts, groups, columns)
    out.matrix(
        at,
        (blocks, scales),
        values=Array(jnp.uint4, (experts, inner, columns), codes),
        scales=Array(jnp.float8_e8m0fnu, lead, exponents),
        codebook=Array(np.float32, (experts, 16), lambda: np.broadcast_to(E2M1, (experts, 16))),
    )
