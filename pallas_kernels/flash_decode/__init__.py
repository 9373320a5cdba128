"""Attention of the newest few tokens over a cache."""

from pallas_kernels.flash_decode.api import flash_decode
from pallas_kernels.flash_decode.blocks import Blocks

__all__ = ["Blocks", "flash_decode"]
