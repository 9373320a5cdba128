"""The decoder: a frozen spec (data) and the one model built from it."""

from jaxinf.models.causal_lm import CausalLM, init_cache
from jaxinf.models.dequantizing import dequantize
from jaxinf.models.spec import ModelSpec, Segment, fold

__all__ = ["CausalLM", "ModelSpec", "Segment", "dequantize", "fold", "init_cache"]
