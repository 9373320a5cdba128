"""Attention over a paged cache, prefill chunks and decode rows mixed in one call; and writing to its pages."""

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.append import paged_append
from pallas_kernels.ragged_paged_attention.blocks import Blocks
from pallas_kernels.ragged_paged_attention.pages import empty_pages, page_width

__all__ = ["Blocks", "empty_pages", "page_width", "paged_append", "ragged_paged_attention"]
