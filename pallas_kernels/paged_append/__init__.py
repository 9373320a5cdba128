"""Writing new tokens to the pages of `ragged_paged_attention`, in place."""

from pallas_kernels.paged_append.api import paged_append

__all__ = ["paged_append"]
