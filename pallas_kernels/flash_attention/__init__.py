"""Attention of many queries over many keys."""

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.blocks import Blocks

__all__ = ["Blocks", "flash_attention"]
