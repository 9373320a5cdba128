"""Smaller models from models."""

from jaxinf.compression.calibration import Calibration
from jaxinf.compression.folding import plant_outliers
from jaxinf.compression.layerwise import Settings, quantize_layer
from jaxinf.compression.quantizing import quantize
from jaxinf.compression.schemes import KEEP, SCHEMES, Scheme, Target, plan, scheme_of

__all__ = [
    "KEEP",
    "SCHEMES",
    "Calibration",
    "Scheme",
    "Settings",
    "Target",
    "plan",
    "plant_outliers",
    "quantize",
    "quantize_layer",
    "scheme_of",
]
