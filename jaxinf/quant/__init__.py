"""Arrays that are stored narrower than they are computed with."""

from jaxinf.quant.formats import FORMATS, Format, format_of, round_to_nearest
from jaxinf.quant.matmul import grouped, matmul
from jaxinf.quant.qtensor import FIELDS, QTensor, nbytes, parts

__all__ = [
    "FIELDS",
    "FORMATS",
    "Format",
    "QTensor",
    "format_of",
    "grouped",
    "matmul",
    "nbytes",
    "parts",
    "round_to_nearest",
]
