"""What arrays take in a TPU's vector memory, which holds them as tiles of 8 by 128 words of 32 bits."""

import jax.numpy as jnp

from pallas_kernels.chips import MIB, Chip

LANES = 128


def narrow(dtype: str) -> bool:
    """Whether values of a dtype stand for others only together with a scale."""
    return dtype in ("int8", "int4") or dtype.startswith("float8")


def bits(dtype: str) -> int:
    return 4 if dtype == "int4" else 8 * jnp.dtype(dtype).itemsize


def sublanes(dtype: str) -> int:
    """Rows of one tile: narrower values are packed along the rows."""
    return 256 // bits(dtype)


def up(x: int, to: int) -> int:
    """x rounded up to a multiple of `to`."""
    return -(-x // to) * to


def tile_bytes(rows: int, columns: int, dtype: str) -> int:
    """What `[rows, columns]` takes, padded to whole tiles."""
    return up(rows, sublanes(dtype)) * up(columns, LANES) * bits(dtype) // 8


def limit(chip: Chip, estimate: int) -> int:
    """What to let the compiler use for a kernel of which `estimate` bytes are accounted for."""
    return min(chip.vmem - MIB, estimate * 5 // 4 + 4 * MIB)
