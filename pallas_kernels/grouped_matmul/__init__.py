"""Rows sorted by group, each multiplied by its group's matrix: the matmul of a mixture of experts."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
