"""Block sizes of the kernel of `grouped_matmul`.

Rows come in tiles of `m`, matrices in parts of `k` by `n`; the rows of a tile that belong to one group go through
the matrix units in windows of `rows`, what is left of them in windows of `tail`.
"""

from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp

from pallas_kernels.chips import MIB, Chip
from pallas_kernels.errors import InputError
from pallas_kernels.tuned import budget
from pallas_kernels.vmem import LANES, bits, narrow, sublanes, tile_bytes, up

# Seconds that a step and a copy cost beside their work, and cycles that the matrix units take to fill and drain.
STEP = 0.1e-6
LATENCY = 0.55e-6
DRAIN = 300
# Multiply-adds of one product in the program: they are unrolled, and compile for seconds.
UNROLLED = 1 << 30
LONG = 1 << 12
# Columns that fill the widest matrix unit.
WIDE = 256


@dataclass(frozen=True)
class Problem:
    """A call: `[rows, inner]` and `[groups, inner, columns]`; rows are padded to whole tiles of VMEM.

    scales: of a column of a narrow matrix, each of an equal part of `inner`.
    """

    rows: int
    inner: int
    columns: int
    groups: int
    lhs: str
    rhs: str
    transpose: bool = False
    scales: int = 1

    @property
    def compute(self) -> str:
        """The dtype that the matrix units multiply."""
        return self.lhs if narrow(self.rhs) else jnp.promote_types(self.lhs, self.rhs).name

    @property
    def align(self) -> int:
        """Rows in VMEM start at multiples of this."""
        return sublanes(self.lhs)


@dataclass(frozen=True)
class Blocks:
    m: int
    n: int
    k: int
    rows: int
    tail: int

    def __post_init__(self):
        if min(self.m, self.n, self.k, self.rows, self.tail) < 1:
            raise InputError(f"blocks={self}, but every size must be 1 or more.")


def chunk(blocks: Blocks, rows: int) -> int:
    """Columns that a window of `rows` multiplies at a time: all of the part, or an equal share of whole lanes."""
    lanes = blocks.n // LANES
    if blocks.n % LANES:
        return blocks.n
    most = max(WIDE, UNROLLED // (max(rows, 256) * blocks.k)) // LANES
    return LANES * next(share for share in range(min(lanes, most), 0, -1) if lanes % share == 0)


def bucket(problem: Problem) -> str:
    """Key of the tuned tables: the rows are rounded up to a power of two, the matrices' shape is exact."""
    p = problem
    rows = 1 << (max(p.rows, 1) - 1).bit_length()
    scales = f"-s{p.scales}" if p.scales > 1 else ""
    return f"{p.lhs}-{p.rhs}-{'t' if p.transpose else 'n'}-m{rows}-g{p.groups}-k{p.inner}-n{p.columns}{scales}"


def scales_of(problem: Problem, blocks: Blocks) -> int:
    """Scales of a column that a part of the matrix needs."""
    return max(1, problem.scales * blocks.k // problem.inner)


def folds(problem: Problem) -> bool:
    """Whether several scales a column multiply the matrix; else the product with each of its parts."""
    return problem.scales > 1 and (problem.inner // problem.scales) % LANES != 0


def stays(problem: Problem, blocks: Blocks) -> bool:
    """Whether all of lhs is in VMEM, copied once."""
    return blocks.m >= problem.rows and blocks.k == problem.inner


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """Bytes of VMEM: two buffers of each operand (one of rows that stay), the sums, and what the compiler keeps."""
    p, b = problem, blocks
    w = (b.n, b.k) if p.transpose else (b.k, b.n)
    total = 2 * tile_bytes(*w, p.rhs) + 2 * tile_bytes(b.m, b.n, p.lhs)
    total += (1 if stays(p, b) else 2) * tile_bytes(b.m, b.k, p.lhs)
    if narrow(p.rhs):
        total += 2 * tile_bytes(scales_of(p, b), b.n, "float32")
    if folds(p):
        columns = max(chunk(b, b.rows), chunk(b, b.tail))
        shape = (columns, b.k) if p.transpose else (b.k, columns)
        total += tile_bytes(*shape, "float32") + tile_bytes(*shape, p.compute)
    if b.k < p.inner:
        total += tile_bytes(b.m, b.n, "float32")
    # The result of a window, and what does not stay in registers of its rows.
    total += tile_bytes(b.rows, b.n, "float32") + tile_bytes(b.rows, b.k, p.lhs)
    if p.compute == "float32":
        # Each operand of a float32 product is split in three bfloat16 parts.
        total += 2 * tile_bytes(b.rows, b.k, "float32") + 2 * tile_bytes(*w, "float32")
    return total


def fits(problem: Problem, blocks: Blocks, chip: Chip) -> bool:
    return vmem_bytes(problem, blocks) <= budget(chip)


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """What keeps these sizes from being tiles of the operands, one sentence each."""
    p, b = problem, blocks
    reasons = []
    if b.m % p.align or b.m > up(p.rows, p.align):
        reasons.append(f"m={b.m} must be a multiple of {p.align} up to {up(p.rows, p.align)}")
    if b.n != p.columns and (b.n % LANES or b.n > p.columns):
        reasons.append(f"n={b.n} must be {p.columns} (all columns) or a smaller multiple of {LANES}")
    if b.k != p.inner and (b.k % 256 or p.inner % b.k):
        reasons.append(f"k={b.k} must be {p.inner} (all of K) or a divisor of it and a multiple of 256")
    if p.scales > 1 and b.k != p.inner and (p.scales * b.k % p.inner or scales_of(p, b) % 8):
        reasons.append(f"k={b.k} must hold a multiple of 8 parts of {p.inner // p.scales} rows that share a scale")
    for name, size in (("rows", b.rows), ("tail", b.tail)):
        if size % p.align or size > b.m:
            reasons.append(f"{name}={size} must be a multiple of {p.align} up to m={b.m}")
    if b.tail > b.rows:
        reasons.append(f"tail={b.tail} must not be more than rows={b.rows}")
    return reasons


def _active(problem: Problem) -> float:
    """How many groups have rows, when each row draws one at random."""
    return problem.groups * (1 - (1 - 1 / problem.groups) ** problem.rows)


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """Sizes worth trying; some may not fit."""
    return _candidates(problem, _splits(problem))


def _splits(problem: Problem) -> list[int]:
    parts = (2, 4, 7, 8, 14, 16, 28, 32, 64)
    return [problem.inner] + [problem.inner // d for d in parts if problem.inner // d >= 512]


def _candidates(problem: Problem, ks: list[int]) -> list[Blocks]:
    p = problem
    most = up(p.rows, p.align)
    # Few rows at a time, for a contraction so long that no more fit.
    least = (32, 64) if p.inner > LONG else ()
    ms = sorted({min(m, most) for m in (*least, 128, 256, 512, 1024, 2048, 4096, 8192)} | {most})
    # Parts of equal width: a narrow last one would be copied and multiplied at full width.
    ns = {p.columns, LANES} | {
        up(-(-p.columns // parts), LANES) for parts in (2, 3, 4, 6, 7, 8, 12, 14, 16, 28, 32, 56, 112)
    }
    mean = 1 << int(p.rows / _active(p) - 1).bit_length()
    found = {}
    for m in ms:
        for window in (mean // 2, mean, 2 * mean):
            rows = up(min(max(window, p.align), 512, m), p.align)
            for tail in sorted({up(max(rows // part, p.align), p.align) for part in (1, 2, 4, 8)}):
                for n in ns:
                    for k in ks:
                        blocks = Blocks(m, n, k, rows, tail)
                        if blocks not in found and not refusals(p, blocks):
                            found[blocks] = None
    return list(found)


def seconds(problem: Problem, blocks: Blocks, chip: Chip) -> float:
    """A model of the kernel's time, for ranking, when the rows are spread evenly over the groups."""
    p, b = problem, blocks
    tiles, steps_n, steps_k = -(-p.rows // b.m), -(-p.columns // b.n), p.inner // b.k
    active = _active(p)
    # A group that starts inside a tile meets that tile and the next.
    visits = active + tiles - 1
    steps = visits * steps_n * steps_k
    x = p.rows * p.inner * bits(p.lhs) / 8
    if steps_k > 1:
        x *= steps_n * visits / tiles
    elif tiles > 1:
        x *= steps_n
    # A visit of one tile after another by the same group keeps its matrix where that is whole.
    w = (visits if steps_k > 1 else active) * p.inner * p.columns * bits(p.rhs) / 8
    # A program runs on one core, or on both where they are one device and the loop over columns can be split.
    share = 1 if chip.megacore and steps_n > 1 else 1 / chip.cores
    bandwidth = share * chip.bandwidth
    # Steps with a new part of a matrix: the next tile of the same group uses the part that is there, and nothing
    # is copied meanwhile.
    fetching = steps if steps_k > 1 else active * steps_n
    copy = (x + w + p.rows * p.columns * bits(p.lhs) / 8) / bandwidth / fetching
    first = (b.m * b.k * bits(p.lhs) + b.k * b.n * bits(p.rhs)) / 8 / bandwidth
    written = b.m * b.n * bits(p.lhs) / 8 / bandwidth
    peak = share * chip.bf16 / (6 if p.compute == "float32" else 1)
    # Loading a part of the matrix takes the matrix units as long as this many rows.
    least = 3 * chip.mxu // 8 if chip.mxu == 128 else 5 * chip.mxu // 8
    mine = p.rows / visits + p.align / 2
    # On average half a window is empty.
    if b.tail < b.rows and mine > b.rows / 2:
        large, small = mine / b.rows - 0.5, b.rows / 2 / b.tail + 0.5
    elif b.tail < b.rows:
        large, small = 0, mine / b.tail + 0.5
    else:
        large, small = max(1, mine / b.rows + 0.5), 0
    product = 0.0
    for count, size in ((large, b.rows), (small, b.tail)):
        width = chunk(b, size)
        area = up(b.k, chip.mxu) * up(width, chip.mxu)
        product += count * b.n / width * max(2 * size * area / peak + DRAIN / chip.clock, 2 * least * area / peak)
    if steps_k > 1:
        product += 4 * mine * b.n / 1024 / chip.clock
    product += STEP
    copies = fetching * max(copy, (copy + product + LATENCY) / 2) + (steps - fetching + 1) * product
    # One step hides the copies of the next; a group that a tile's end cuts has short steps.
    exposed = (tiles - 1) * steps_n * max(0.4 * first, first - product)
    return LATENCY + max(first + steps * product + exposed + written, copies)


@cache
def _fitting(problem: Problem, chip: Chip) -> list[Blocks]:
    whole = [b for b in _candidates(problem, [problem.inner]) if fits(problem, b, chip)]
    return whole or [b for b in candidates(problem, chip) if fits(problem, b, chip)]


def shortage(problem: Problem, chip: Chip) -> str | None:
    """Why no sizes fit, if none do."""
    if 0 in (problem.rows, problem.inner, problem.columns) or _fitting(problem, chip):
        return None
    least = min((vmem_bytes(problem, b) for b in candidates(problem, chip)), default=0)
    return (
        f"lhs=[{problem.rows}, {problem.inner}] and rhs=[{problem.groups}, {problem.inner}, {problem.columns}] "
        f"need {least / MIB:.1f} MiB of VMEM, but a {chip.name} has {budget(chip) / MIB:.1f} for a "
        "kernel: pad K to a multiple of 512"
    )


@cache
def heuristic(problem: Problem, chip: Chip) -> Blocks:
    """The candidate that the model of time finds fastest among those that fit.

    Raises:
      InputError: none fits; says how much the smallest needs.
    """
    if reason := shortage(problem, chip):
        raise InputError(f"{reason}, or use implementation='xla'.")
    return min(_fitting(problem, chip), key=lambda b: seconds(problem, b, chip))
