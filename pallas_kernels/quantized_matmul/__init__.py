"""Activations times a weight that is stored narrower than it is computed with."""

from pallas_kernels.quantized_matmul.api import quantized_matmul

__all__ = ["quantized_matmul"]
