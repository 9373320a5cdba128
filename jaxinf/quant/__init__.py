"""Arrays that are stored narrower than they are computed with."""

from jaxinf.quant.qtensor import QTensor, parts, round_to_nearest, stored

__all__ = ["QTensor", "parts", "round_to_nearest", "stored"]
