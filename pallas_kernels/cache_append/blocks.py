"""Block sizes of `cache_append`."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.chips import Chip
from pallas_kernels.errors import InputError

LANES = 128


@dataclass(frozen=True)
class Blocks:
    """How much of the cache is merged and written at a time.

    window: slots of one read and write, where more than one token of a row is appended; it is cut down to what
      divides the cache. A single token takes one tile.
    depth: groups of rows on their way to or from VMEM; even.
    rows: rows of the batch in a group.
    """

    window: int
    depth: int = 4
    rows: int = 1

    def __post_init__(self):
        if self.window < 8 or self.window & (self.window - 1) or self.rows < 1 or self.depth < 2 or self.depth % 2:
            raise InputError(
                f"blocks={self}, but window must be a power of two of 8 or more, rows 1 or more and depth even."
            )


@dataclass(frozen=True)
class Problem:
    """The static facts of a call."""

    batch: int
    kv_heads: int
    slots: int
    dim: int
    tokens: int
    cache: str
    scaled: bool = False
    ring: bool = False

    @property
    def lanes(self) -> bool:
        """Whether XLA lays the cache out with its slots along the lanes: it avoids padding."""
        return self.dim % LANES != 0

    def tile(self, scales: bool) -> int:
        """Slots of one tile in HBM."""
        if scales or self.lanes:
            return LANES
        return 32 if jnp.dtype(self.cache).itemsize == 1 else 8

    def window(self, scales: bool, blocks: Blocks) -> int:
        """Slots of one read and write: tiles, doubled while they divide the cache and tokens fill them."""
        size = self.tile(scales)
        tiled = -(-self.slots // size) * size
        while 2 * size <= blocks.window and tiled % (2 * size) == 0 and size < self.tokens:
            size *= 2
        return size


def bucket(problem: Problem) -> str:
    """Key of the tuned tables."""
    p = problem
    tokens = 1 << (p.tokens - 1).bit_length()
    return f"{p.cache}-b{1 << (p.batch - 1).bit_length()}-k{p.kv_heads}-d{p.dim}-t{tokens}" + "-scaled" * p.scaled


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """What the kernel holds in VMEM: windows and the tokens for them, and a merge's temporaries in 32 bits."""
    p = problem
    values = p.window(False, blocks) * p.kv_heads * p.dim
    source = 2 * values if p.tokens > 1 else p.kv_heads * max(p.dim, 8) * LANES
    total = blocks.depth * blocks.rows * (values + source) * jnp.dtype(p.cache).itemsize + 12 * values
    if p.scaled:
        total += blocks.depth * blocks.rows * 3 * p.window(True, blocks) * p.kv_heads * 4
    return total


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """Why the kernel cannot work with these sizes."""
    return misfits(problem.batch, blocks)


def misfits(batch: int, blocks: Blocks) -> list[str]:
    """The same: only the batch counts."""
    return [f"blocks.rows={blocks.rows} does not divide the batch of {batch}"] if batch % blocks.rows else []


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """What a search tries."""
    windows = (8,) if problem.tokens == 1 else (128, 256, 512, 1024)
    rows = [n for n in (1, 2, 4, 8, 16) if problem.batch % n == 0]
    return [Blocks(window, depth, n) for window in windows for depth in (4, 8, 16) for n in rows]


def heuristic(problem: Problem, chip: Chip) -> Blocks:
    """Single tokens are bound by scalar code, which rows side by side share; chunks by copies."""
    if problem.tokens == 1:
        whole = problem.batch // 2 if chip.megacore and problem.batch % 2 == 0 else problem.batch
        sizes = Blocks(8, 4, math.gcd(whole, 4))
    else:
        sizes = Blocks(256, 8)
    limit = tuned.budget(chip) // 4
    while vmem_bytes(problem, sizes) > limit and (sizes.rows > 1 or sizes.window > 8):
        sizes = Blocks(max(sizes.window // 2, 8), 4)
    return sizes
