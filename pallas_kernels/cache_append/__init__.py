"""Writing new tokens into a cache, in place."""

from pallas_kernels.cache_append.api import cache_append
from pallas_kernels.cache_append.blocks import Blocks
from pallas_kernels.cache_append.quantize import dequantize_tokens, quantize_tokens

__all__ = ["Blocks", "cache_append", "dequantize_tokens", "quantize_tokens"]
