"""Smaller models from models."""

from jaxinf.compression.quantizing import SCHEMES, quantize
from jaxinf.training.rounding import BITNET, Rounding, finish_qat, start_qat

__all__ = ["BITNET", "SCHEMES", "Rounding", "finish_qat", "quantize", "start_qat"]
