"""AutoAWQ's weights, version "gemm": `quant_method: awq`.

    qweight int32 [in, out / 8]           eight 4-bit codes a word
    qzeros  int32 [in / group, out / 8]   as many zero points
    scales  float16 [in / group, out]     w = (q - z) * s

The codes at bits 0, 4, 8, ... of a word are those of columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight
(casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.published.decoded import (
    Array,
    Decoding,
    codes_of_words,
    expect_shape,
    modules,
    need,
    signed,
)
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import Tensors

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the code at bit 0, 4, ..."""
_AT = np.argsort(ORDER)


def read(section: Config, tensors: Tensors) -> Decoding:
    section.only("bits", 4)
    version = section.str("version", default="gemm")
    if version.lower() != "gemm":
        raise section.refuse("version", "is not read; gemm is")
    out = Decoding(Quantization("awq"))
    for at in modules(tensors, ".qweight"):
        _module(out, tensors, at)
    return out


def _module(out: Decoding, tensors: Tensors, at: str) -> None:
    qweight, qzeros, scales = (f"{at}.{name}" for name in ("qweight", "qzeros", "scales"))
    inner, words = need(tensors, qweight, 2).shape
    groups, columns = need(tensors, scales, 2).shape
    expect_shape(qweight, (inner, words), (inner, columns // 8))
    expect_shape(qzeros, need(tensors, qzeros).shape, (groups, columns // 8))

    def scale() -> np.ndarray:
        wide = tensors.read(scales).astype(np.float32).T
        return wide[:, 0] if groups == 1 else wide

    out.matrix(
        f"{at}.weight",
        (qweight, qzeros, scales),
        values=Array(jnp.int4, (columns, inner), lambda: signed(_codes(tensors.read(qweight)), 4).T),
        scales=Array(np.float32, (columns,) if groups == 1 else (columns, groups), scale),
        zeros=Array(np.float32, (columns, groups), lambda: _codes(tensors.read(qzeros)).T.astype(np.float32) - 8),
    )


def _codes(words: np.ndarray) -> np.ndarray:
    codes = codes_of_words(words, 4)
    return codes.reshape(*words.shape, 8)[..., _AT].reshape(codes.shape)
