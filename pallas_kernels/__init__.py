"""Ops on arrays, one folder each: a reference in plain `jax.numpy` and fast formulations beside it."""

from pallas_kernels.cache_append import cache_append
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_decode import flash_decode
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.paged_append import paged_append
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.ragged_paged_attention import ragged_paged_attention

__all__ = [
    "cache_append",
    "flash_attention",
    "flash_decode",
    "grouped_matmul",
    "paged_append",
    "quantized_matmul",
    "ragged_paged_attention",
]
