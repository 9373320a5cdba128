"""Smaller models from models."""

from jaxinf.compression.quantizing import SCHEMES, quantize

__all__ = ["SCHEMES", "quantize"]
