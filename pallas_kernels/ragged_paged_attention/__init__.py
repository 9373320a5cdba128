"""Attention over a paged cache, prefill chunks and decode rows mixed in one call."""

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.blocks import Blocks
from pallas_kernels.ragged_paged_attention.pages import empty_pages, page_width

__all__ = ["Blocks", "empty_pages", "page_width", "ragged_paged_attention"]
