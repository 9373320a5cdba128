"""What arrays take in a TPU's vector memory, which holds them as tiles of 8 by 128 words of 32 bits."""

import jax.numpy as jnp

from pallas_kernels.chips import MIB, Chip

LANES = 128


def narrow(dtype: str) -> bool:
    """Whether values of a dtype stand for others only together with a scale."""
    return "int" in dtype or dtype.startswith("float8")


def bits(dtype: str) -> int:
    """Of a value where it lies: numpy counts a byte at least."""
    return {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4}.get(dtype) or 8 * jnp.dtype(dtype).itemsize


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
