"""GPTQ's weights as AutoGPTQ and GPTQModel write them: `quant_method: gptq`.

    qweight int32 [in * bits / 32, out]      codes of one column, consecutive rows, low bits first
    qzeros  int32 [groups, out * bits / 32]  zero points of one group, low bits first
    scales  float16 [groups, out]            w = (q - z) * s
    g_idx   int32 [in]                       the group of each row; with `desc_act` groups are no neighbours

`checkpoint_format` "gptq" (and none) stores z - 1, taken off whole words, so that a 0 borrows from its neighbour;
"gptq_v2" stores z itself. With `sym`, z is half the codes' number
(ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear and utils/model.py: convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

from dataclasses import dataclass

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

_OFFSET = {"gptq": 1, "gptq_v2": 0}
"""What is to be added to a stored zero point, of every code of a word at once."""


def read(section: Config, tensors: Tensors) -> Decoding:
    bits = section.int("bits")
    code_dtype(bits)
    offset = section.choose(_OFFSET, "checkpoint_format", "format", default="gptq")
    section.only("rotation", None, False, "")
    symmetric = section.bool("sym", default=True)
    out = Decoding(Quantization("gptq"))
    found = [_Module(tensors, at, bits, offset, symmetric) for at in modules(tensors, ".qweight")]
    # Stacked layers are alike, so where one module has an order of its own all are given one.
    ordered = any(module.ordered for module in found)
    for module in found:
        module.add(out, ordered)
    return out


@dataclass(frozen=True)
class _Module:
    tensors: Tensors
    at: str
    bits: int
    offset: int
    symmetric: bool

    def add(self, out: Decoding, ordered: bool) -> None:
        inner, columns, groups = self._sizes()
        out.matrix(
            f"{self.at}.weight",
            [f"{self.at}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")],
            values=Array(code_dtype(self.bits), (columns, inner), self._values),
            scales=Array(np.float32, (columns,) if groups == 1 else (columns, groups), self._scales),
            zeros=None if self.symmetric else Array(np.float32, (columns, groups), self._zeros),
            order=Array(np.int32, (inner,), self._order) if ordered else None,
        )

    @property
    def ordered(self) -> bool:
        order = self._order()
        return not np.array_equal(order, np.arange(len(order)))

    def _sizes(self) -> tuple[int, int, int]:
        rows, columns = need(self.tensors, f"{self.at}.qweight", 2).shape
        inner, groups = rows * 32 // self.bits, need(self.tensors, f"{self.at}.scales", 2).shape[0]
        expect_shape(f"{self.at}.scales", self.tensors[f"{self.at}.scales"].shape, (groups, columns))
        zeros = f"{self.at}.qzeros"
        expect_shape(zeros, need(self.tensors, zeros).shape, (groups, columns * self.bits // 32))
        if f"{self.at}.g_idx" in self.tensors:
            expect_shape(f"{self.at}.g_idx", self.tensors[f"{self.at}.g_idx"].shape, (inner,))
        elif inner % groups:
            raise CheckpointError(f"{self.at}.scales has {groups} groups, which do not divide {inner} channels")
        return inner, columns, groups

    def _order(self) -> np.ndarray:
        inner, _, groups = self._sizes()
        if f"{self.at}.g_idx" not in self.tensors:
            return np.arange(inner, dtype=np.int32)
        return in_order(self.tensors.read(f"{self.at}.g_idx"), groups, f"{self.at}.g_idx")

    def _values(self) -> np.ndarray:
        if self.symmetric and np.any(self._zeros()):
            raise CheckpointError(
                f"{self.at}.qzeros holds zero points that are not {2 ** (self.bits - 1)}, though "
                "quantization_config says sym; the checkpoint is damaged"
            )
        codes = codes_of_words(self.tensors.read(f"{self.at}.qweight").T, self.bits)
        order = self._order()
        if not np.array_equal(order, np.arange(len(order))):
            codes = codes[:, order]
        return signed(codes, self.bits)

    def _scales(self) -> np.ndarray:
        wide = self.tensors.read(f"{self.at}.scales").astype(np.float32).T
        return wide[:, 0] if wide.shape[1] == 1 else wide

    def _zeros(self) -> np.ndarray:
        each = sum(self.offset << at for at in range(0, 32, self.bits))
        whole = self.tensors.read(f"{self.at}.qzeros").view(np.uint32) + np.uint32(each)
        return codes_of_words(whole, self.bits).T.astype(np.float32) - 2 ** (self.bits - 1)
