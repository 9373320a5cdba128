"""Ops on arrays, one folder each: a reference in plain `jax.numpy` and fast formulations beside it."""

from pallas_kernels.grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul"]
