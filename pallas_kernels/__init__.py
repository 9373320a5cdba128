"""Ops on arrays, one folder each: a reference in plain `jax.numpy` and fast formulations beside it."""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantized_matmul import quantized_matmul

__all__ = ["grouped_matmul", "quantized_matmul"]
