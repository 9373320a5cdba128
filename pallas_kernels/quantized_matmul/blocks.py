"""Block sizes of the kernel of `quantized_matmul`.

An output tile is `m` rows by `n` columns; `k` of the contraction are in VMEM at a time (all of it where that fits:
then nothing is accumulated across steps). Inside a step the rows go through the matrix units `rows` at a time.
"""

from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp

from pallas_kernels.chips import MIB, Chip
from pallas_kernels.errors import InputError
from pallas_kernels.tuned import budget
from pallas_kernels.vmem import LANES, bits, narrow, sublanes, tile_bytes, up

# Seconds that a step and a copy cost beside their work, and cycles that the matrix units take to fill and drain.
STEP = 0.05e-6
LATENCY = 0.55e-6
DRAIN = 400
LONG = 1 << 12


@dataclass(frozen=True)
class Problem:
    """A call: `[rows, inner] @ [inner, columns]`; `groups` scales a column (0: none)."""

    rows: int
    inner: int
    columns: int
    x: str
    w: str
    out: str
    groups: int = 0
    transpose: bool = False

    @property
    def compute(self) -> str:
        """The dtype that the matrix units multiply."""
        if self.x == "int8":
            return "int8"
        return self.x if narrow(self.w) else jnp.promote_types(self.x, self.w).name

    @property
    def group(self) -> int:
        """Rows of the weight that share a scale."""
        return self.inner // self.groups if self.groups > 1 else self.inner


@dataclass(frozen=True)
class Blocks:
    m: int
    n: int
    k: int
    rows: int

    def __post_init__(self):
        if min(self.m, self.n, self.k, self.rows) < 1:
            raise InputError(f"blocks={self}, but every size must be 1 or more.")


def widens(problem: Problem, blocks: Blocks) -> bool:
    """Whether the weight is first turned into the dtype of the products in VMEM, scales by group included.

    Scales by group can also multiply the product of each group, which is exact and cheaper for few rows.
    """
    return _folds(problem, blocks) or (problem.w.startswith("float8") and problem.rows > blocks.rows)


def _folds(problem: Problem, blocks: Blocks) -> bool:
    if problem.groups < 2 or problem.compute == "int8":
        return False
    return problem.group % LANES != 0 or problem.rows > LANES


def columns_outside(problem: Problem, blocks: Blocks) -> bool:
    """Whether the loop over rows is the inner one: the weight is read once, the activations once a column tile."""
    x, w = problem.rows * bits(problem.x), problem.columns * bits(problem.w)
    return w + x * -(-problem.columns // blocks.n) <= x + w * -(-problem.rows // blocks.m)


def bucket(problem: Problem) -> str:
    """Key of the tuned tables: the rows are rounded up to a power of two, the weight's shape is exact."""
    p = problem
    rows = 1 << (max(p.rows, 1) - 1).bit_length()
    layout = "t" if p.transpose else "n"
    return f"{p.x}-{p.w}-g{p.groups}-{p.out}-{layout}-m{rows}-k{p.inner}-n{p.columns}"


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """Bytes of VMEM: two buffers of each operand, the sums, and the values that the compiler keeps there."""
    p, b = problem, blocks
    w = (b.n, b.k) if p.transpose else (b.k, b.n)
    total = 2 * tile_bytes(b.m, b.k, p.x) + 2 * tile_bytes(*w, p.w) + 2 * tile_bytes(b.m, b.n, p.out)
    if p.groups:
        total += 2 * tile_bytes(max(1, p.groups * b.k // p.inner), b.n, "float32")
    if p.x == "int8":
        total += 2 * tile_bytes(b.m, 1, "float32")
    if b.k < p.inner:
        total += tile_bytes(b.m, b.n, "float32")
    if widens(p, b):
        total += tile_bytes(*w, p.compute)
    window = min(b.rows, b.m)
    # The result of a window, and what does not stay in registers of its rows.
    total += tile_bytes(window, b.n, "float32") + tile_bytes(window, b.k, p.x)
    if p.compute == "float32":
        # Each operand of a float32 product is split in three bfloat16 parts.
        total += 2 * tile_bytes(window, b.k, "float32") + 2 * tile_bytes(*w, "float32")
    return total


def fits(problem: Problem, blocks: Blocks, chip: Chip) -> bool:
    return vmem_bytes(problem, blocks) <= budget(chip)


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """What keeps these sizes from being tiles of the operands, one sentence each."""
    p, b = problem, blocks
    sub = max(sublanes(p.x), sublanes(p.out))
    reasons = []
    if b.m != p.rows and b.m % sub:
        reasons.append(f"m={b.m} must be {p.rows} (all rows) or a multiple of {sub}")
    if b.n != p.columns and b.n % LANES:
        reasons.append(f"n={b.n} must be {p.columns} (all columns) or a multiple of {LANES}")
    if b.k != p.inner and (b.k % 256 or p.inner % b.k):
        reasons.append(f"k={b.k} must be {p.inner} (all of K) or a divisor of it and a multiple of 256")
    if b.rows != b.m and (b.rows % sub or b.m % b.rows):
        reasons.append(f"rows={b.rows} must divide m={b.m} and be a multiple of {sub}")
    if p.groups > 1 and b.k != p.inner and (b.k % p.group or (b.k // p.group) % 8):
        reasons.append(f"k={b.k} must hold a multiple of 8 groups of {p.group} rows that share a scale")
    return reasons


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """Sizes worth trying; some may not fit."""
    p = problem
    ms = [p.rows] if p.rows <= 512 else [m for m in (256, 512, 1024, 2048, 4096) if m < 2 * p.rows]
    # Few rows at a time, for a contraction so long that no more fit.
    ms += [m for m in (32, 64, 128) if m < p.rows and p.inner > LONG]
    ns = [n for n in (128, 256, 512, 768, 1024, 2048, 4096) if n < p.columns] or [p.columns]
    ks = [p.inner] + [p.inner // d for d in (2, 4, 7, 8, 14, 16, 28, 32, 64) if p.inner % d == 0]
    found = []
    for m in ms:
        for n in ns:
            for k in ks:
                for rows in [m] if m <= 512 else [256, 512]:
                    blocks = Blocks(m, n, k, rows)
                    if not refusals(p, blocks) and (k == p.inner or k >= 512):
                        found.append(blocks)
    return found


def seconds(problem: Problem, blocks: Blocks, chip: Chip) -> float:
    """A model of the kernel's time, for ranking: copies, products, and what keeps one from hiding the other."""
    p, b = problem, blocks
    steps_m, steps_n, steps_k = -(-p.rows // b.m), -(-p.columns // b.n), p.inner // b.k
    steps = steps_m * steps_n * steps_k
    x, w = p.rows * p.inner * bits(p.x) / 8, p.inner * p.columns * bits(p.w) / 8
    if steps_k > 1:
        x, w = x * steps_n, w * steps_m
    elif columns_outside(p, b):
        x *= steps_n
    else:
        w *= steps_m
    # A program runs on one core, or on both where they are one device and the tiles can be split.
    share = 1 if chip.megacore and steps_m * steps_n > 1 else 1 / chip.cores
    bandwidth = share * chip.bandwidth
    copy = (x + w + p.rows * p.columns * bits(p.out) / 8) / bandwidth / steps
    first = (min(b.m, p.rows) * b.k * bits(p.x) + b.k * min(b.n, p.columns) * bits(p.w)) / 8 / bandwidth
    written = min(b.m, p.rows) * b.n * bits(p.out) / 8 / bandwidth
    peak = share * (chip.int8 if p.compute == "int8" else chip.bf16 / (6 if p.compute == "float32" else 1))
    # Loading a part of the weight takes the matrix units as long as this many rows.
    least = 3 * chip.mxu // 8 if chip.mxu == 128 else 5 * chip.mxu // 8
    windows = max(1, min(b.m, p.rows) // b.rows)
    row = 2 * up(b.k, chip.mxu) * up(b.n, chip.mxu) / peak
    product = windows * max(min(b.rows, p.rows) * row + DRAIN / chip.clock, least * row) + STEP
    if steps_k > 1:
        product += 4 * b.m * b.n / 1024 / chip.clock
    if widens(p, b):
        share = 1 / steps_m if steps_k == 1 and columns_outside(p, b) else 1
        product += share * b.k * b.n / 1024 * 3 / chip.clock
    # A copy is asked for while the one before it is under way: its latency shows unless products are short.
    copies = steps * max(copy, (copy + product + LATENCY) / 2) + product
    return LATENCY + max(first + steps * product + written, copies)


@cache
def _fitting(problem: Problem, chip: Chip) -> list[Blocks]:
    return [b for b in candidates(problem, chip) if fits(problem, b, chip)]


def shortage(problem: Problem, chip: Chip) -> str | None:
    """Why no sizes fit, if none do."""
    if 0 in (problem.rows, problem.inner, problem.columns) or _fitting(problem, chip):
        return None
    least = min((vmem_bytes(problem, b) for b in candidates(problem, chip)), default=0)
    return (
        f"x=[{problem.rows}, {problem.inner}] and w=[{problem.inner}, {problem.columns}] need "
        f"at least {least / MIB:.1f} MiB of VMEM, but a {chip.name} has {budget(chip) / MIB:.1f} MiB for a kernel: "
        "pad K to a multiple of 512"
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
