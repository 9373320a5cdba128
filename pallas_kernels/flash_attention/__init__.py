"""Attention of many queries over many keys."""

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.blocks import Blocks
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks

__all__ = ["Blocks", "XlaBlocks", "flash_attention"]
