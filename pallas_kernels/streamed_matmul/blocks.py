"""Block sizes of the kernels of `streamed_matmul`.

A tile is `k` whole rows of one weight: one contiguous run of bytes in HBM. `ring` tiles of a weight are in VMEM at
a time, besides those that were fetched before the kernel began.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.chips import MIB, Chip
from pallas_kernels.errors import InputError
from pallas_kernels.tuned import budget
from pallas_kernels.vmem import LANES, bits, tile_bytes

MOST_ROWS = 256
"""Of activations: with more, a product is bound by arithmetic, and tiles of whole weight rows are no help."""
_TILE = MIB


@dataclass(frozen=True)
class Problem:
    """A call: `[rows, inner]` times a `[inner, n]` for each n of `columns`."""

    rows: int
    inner: int
    columns: tuple[int, ...]
    x: str
    w: str
    out: str

    @property
    def compute(self) -> str:
        """The dtype that the matrix units multiply."""
        return self.x if "int" in self.w else jnp.promote_types(self.x, self.w).name

    def tile(self, k: int, weight: int) -> int:
        """Bytes of a tile of a weight."""
        return k * self.columns[weight] * bits(self.w) // 8


@dataclass(frozen=True)
class Blocks:
    k: int
    ring: int = 6

    def __post_init__(self):
        if min(self.k, self.ring) < 1:
            raise InputError(f"blocks={self}, but every size must be 1 or more.")


def ahead(problem: Problem, blocks: Blocks, size: int) -> tuple[int, ...]:
    """How many tiles of each weight, in their order, `size` bytes hold."""
    found = []
    for weight in range(len(problem.columns)):
        each = problem.tile(blocks.k, weight)
        count = min(problem.inner // blocks.k, size // each)
        size = size - count * each if count == problem.inner // blocks.k else 0
        found.append(count)
    return tuple(found)


def bucket(problem: Problem) -> str:
    """Key of the tuned tables."""
    p = problem
    rows = 1 << (max(p.rows, 1) - 1).bit_length()
    return f"{p.x}-{p.w}-{p.out}-m{rows}-k{p.inner}-n{'+'.join(map(str, p.columns))}"


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """Bytes of VMEM: activations, sums, a ring for each weight, and a tile in the dtype of the products."""
    p, widest = problem, max(problem.columns)
    total = tile_bytes(p.rows, p.inner, p.x) + tile_bytes(blocks.k, widest, p.compute)
    for n in p.columns:
        total += tile_bytes(p.rows, n, "float32") + tile_bytes(p.rows, n, p.out) + tile_bytes(1, n, "float32")
        total += blocks.ring * tile_bytes(blocks.k, n, p.w)
    if p.compute == "float32":
        total += 2 * tile_bytes(p.rows, p.inner, "float32") + 2 * tile_bytes(blocks.k, widest, "float32")
    return total


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """What keeps these sizes from being tiles of the weights, one sentence each."""
    if problem.inner % blocks.k or blocks.k % LANES:
        return [f"k={blocks.k} must divide the {problem.inner} rows of the weights and be a multiple of {LANES}"]
    return []


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """Sizes worth trying; some may not fit."""
    ks = [k for k in range(LANES, problem.inner + 1, LANES) if problem.inner % k == 0]
    return [Blocks(k, ring) for k in ks if k >= min(512, ks[-1]) for ring in (2, 3, 4)]


def heuristic(problem: Problem, chip: Chip) -> Blocks:
    """The largest tile of at most a mebibyte: long copies, of which few must arrive before work begins."""
    ks = [k for k in range(LANES, problem.inner + 1, LANES) if problem.inner % k == 0]
    widest = max(range(len(problem.columns)), key=lambda i: problem.columns[i])
    small = [k for k in ks if problem.tile(k, widest) <= _TILE]
    return Blocks(small[-1] if small else ks[0])


def unsupported(problem: Problem, blocks: Blocks | None, chip: Chip) -> list[str]:
    """Why the kernel cannot serve a call, one reason each."""
    p, reasons = problem, []
    for name, dtype in (("x", p.x), ("weights", p.w), ("out_dtype", p.out)):
        if dtype == "float16":
            reasons.append(f"{name} is float16, which TPUs do not compute with")
    if not 0 < p.rows <= MOST_ROWS:
        reasons.append(f"x has {p.rows} rows, but 1 to {MOST_ROWS} are taken")
    if p.inner % LANES or any(n % LANES for n in p.columns):
        reasons.append(f"K={p.inner} and N={p.columns} must be multiples of {LANES}")
    if not reasons and vmem_bytes(p, blocks or heuristic(p, chip)) > budget(chip):
        reasons.append(f"x and the tiles need more than the {budget(chip) / MIB:.0f} MiB of VMEM of a {chip.name}")
    return reasons
