"""Smaller models from models."""

from jaxinf.compression.calibration import Calibration
from jaxinf.compression.divergence import Divergence, divergence
from jaxinf.compression.folding import plant_outliers
from jaxinf.compression.layerwise import Settings, quantize_layer
from jaxinf.compression.quantizing import quantize
from jaxinf.compression.schemes import KEEP, SCHEMES, Scheme, Target, plan, scheme_of
from jaxinf.models.dequantizing import dequantize
from jaxinf.training.rounding import BITNET, Rounding, finish_qat, start_qat

__all__ = [
    "BITNET",
    "KEEP",
    "SCHEMES",
    "Calibration",
    "Divergence",
    "Rounding",
    "Scheme",
    "Settings",
    "Target",
    "dequantize",
    "divergence",
    "finish_qat",
    "plan",
    "plant_outliers",
    "quantize",
    "quantize_layer",
    "scheme_of",
    "start_qat",
]
