"""Arrays that are stored narrower than they are computed with."""

from jaxinf.quant.estimator import TRAINABLE, fake_quant, rounded
from jaxinf.quant.fake import FakeQuant
from jaxinf.quant.formats import FORMATS, Format, format_of, round_to_nearest
from jaxinf.quant.matmul import grouped, matmul
from jaxinf.quant.qtensor import FIELDS, QTensor, nbytes, parts

__all__ = [
    "FIELDS",
    "FORMATS",
    "TRAINABLE",
    "FakeQuant",
    "Format",
    "QTensor",
    "fake_quant",
    "format_of",
    "grouped",
    "matmul",
    "nbytes",
    "parts",
    "round_to_nearest",
    "rounded",
]
