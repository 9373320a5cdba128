"""A few rows times several weights that stream from HBM, whose first tiles may already be on their way."""

from pallas_kernels.streamed_matmul.api import Fetched, fetch, streamed_matmul

__all__ = ["Fetched", "fetch", "streamed_matmul"]
