"""Block sizes of `flash_decode`."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.chips import Chip
from pallas_kernels.errors import InputError
from pallas_kernels.masks import Rules

LANES = 128


@dataclass(frozen=True)
class Blocks:
    """How much of the cache is read at a time.

    kv: slots of a chunk (of the kernel: a multiple of 128).
    depth: chunks in VMEM, one in use and the others on their way.
    rows: rows of the batch that are attended to together: for short caches.
    splits: parts of each row's slots, merged at the end: for the cores of a chip.
    """

    kv: int
    depth: int = 3
    rows: int = 1
    splits: int = 1

    def __post_init__(self):
        if min(self.kv, self.rows, self.splits) < 1 or self.depth < 2:
            raise InputError(f"blocks={self}, but sizes must be 1 or more, and depth 2 or more.")


def default_blocks(slots: int) -> Blocks:
    """Block size for the XLA form."""
    return Blocks(min(slots, 256))


@dataclass(frozen=True)
class Problem:
    """The static facts of a call."""

    batch: int
    kv_heads: int
    rows: int  # queries of one KV head: query heads that share it times tokens
    tokens: int
    slots: int
    head_dim: int
    value_dim: int
    dtype: str
    cache: str
    stored: tuple[str, ...] = ("k", "v")  # of "k", "v", "k_scale", "v_scale"; without "v" the keys are the values
    left: int | None = None  # of the window
    ring: bool = False
    tree: bool = False
    alibi: bool = False

    @property
    def compute(self) -> str:
        """The dtype of the products."""
        wide = "float32" in (self.dtype, self.cache) or self.dtype == "float16"
        return "float32" if wide else "bfloat16"

    @property
    def float_cache(self) -> bool:
        """Whether stored values may be nan."""
        return self.cache != "int8"

    def turned(self, dim: int) -> bool:
        """Whether XLA lays [.., S, dim] out with the slots along the lanes: it avoids padding."""
        return dim % LANES != 0

    def lanes(self, name: str) -> bool:
        """Whether slots lie along the lanes of a stored array."""
        dims = {"k": self.head_dim, "v": self.value_dim}
        return name not in dims or self.turned(dims[name])

    @property
    def align(self) -> int:
        """Slots to whose multiples copies keep: those of a tile in HBM."""
        if any(self.lanes(name) for name in self.stored):
            return LANES
        return 32 if jnp.dtype(self.cache).itemsize == 1 else 8

    def chunk(self, name: str, kv: int) -> tuple[int, ...]:
        """Shape of one head's chunk of a stored array."""
        dims = {"k": self.head_dim, "v": self.value_dim}
        if name not in dims:
            return (kv,)
        return (dims[name], kv) if self.lanes(name) else (kv, dims[name])


def describe(q, k, v, k_scale, v_scale, alibi_slopes, rules: Rules, ring: bool) -> Problem:
    """The problem of a call with these arrays, the cache stacked."""
    batch, heads, tokens, dim = q.shape
    groups, slots = k.shape[2:4]
    arrays = dict(k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    return Problem(
        batch=batch,
        kv_heads=groups,
        rows=heads // groups * tokens,
        tokens=tokens,
        slots=slots,
        head_dim=dim,
        value_dim=dim if v is None else v.shape[-1],
        dtype=q.dtype.name,
        cache=k.dtype.name,
        stored=tuple(name for name, x in arrays.items() if x is not None),
        left=rules.left,
        ring=ring,
        tree=rules.ancestors is not None,
        alibi=alibi_slopes is not None,
    )


def bucket(problem: Problem) -> str:
    """Key of the tuned tables."""
    p = problem
    parts = [p.dtype, p.cache, f"b{_rounded(p.batch)}", f"k{p.kv_heads}", f"r{_rounded(p.rows)}"]
    parts += [f"s{_rounded(p.slots)}", f"d{p.head_dim}", f"v{p.value_dim}"]
    parts += ["ring"] * p.ring
    if p.left is not None and not p.ring:
        parts.append(f"w{_rounded(p.left + 1)}")
    return "-".join(parts)


def _rounded(n: int) -> int:
    """n up to a power of two."""
    return 1 << (n - 1).bit_length()


def _slot_bytes(problem: Problem) -> int:
    """Bytes of one slot of one row, all heads, in VMEM."""
    size = jnp.dtype(problem.cache).itemsize
    bytes_of = {"k": problem.head_dim * size, "v": problem.value_dim * size, "k_scale": 4, "v_scale": 4}
    return problem.kv_heads * sum(bytes_of[name] for name in problem.stored)


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """What the kernel holds in VMEM: buffers, queries and results twice, state, and a score block's temporaries."""
    p = problem
    buffers = blocks.depth * blocks.rows * blocks.kv * _slot_bytes(p)
    rows = -(-p.rows // 8) * 8
    state = blocks.rows * p.kv_heads * rows * (2 * LANES + p.value_dim) * 4
    ends = 2 * blocks.rows * p.kv_heads * rows * (p.head_dim + p.value_dim + LANES) * 4
    units = blocks.rows * min(p.kv_heads, 8)
    scores = units * rows * blocks.kv * 3 * 4
    values = blocks.kv * (p.head_dim + p.value_dim) * 4
    return buffers + state + ends + scores + values


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """Why the kernel cannot work with these sizes."""
    return misfits(problem.batch, blocks)


def misfits(batch: int, blocks: Blocks) -> list[str]:
    """The same, of all that only depends on the batch."""
    reasons = []
    if blocks.kv % LANES:
        reasons.append(f"blocks.kv={blocks.kv} is no multiple of {LANES}")
    if batch % blocks.rows:
        reasons.append(f"blocks.rows={blocks.rows} does not divide the batch of {batch}")
    return reasons


def cores(problem: Problem, blocks: Blocks, chip: Chip) -> int:
    """Cores of the chip that one call can use."""
    items = problem.batch // blocks.rows * blocks.splits
    return 2 if chip.megacore and items % 2 == 0 else 1


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """What a search tries."""
    p = problem
    most = -(-_reach(p) // LANES) * LANES
    sizes = sorted({min(LANES << n, most) for n in range(8)})
    splits = (1, 2) if chip.megacore else (1,)
    rows = [n for n in (1, 2, 4, 8, 16, 32) if p.batch % n == 0]
    every = [Blocks(kv, depth, r, s) for kv in sizes for depth in (2, 3, 4, 8) for r in rows for s in splits]
    # Beyond this a chunk only delays the first one's arrival.
    return [b for b in every if b.kv == LANES or b.kv * b.rows * _slot_bytes(p) <= 8 << 20]


def heuristic(problem: Problem, chip: Chip) -> Blocks:
    """The least `cycles`; of what comes within 2 % of it, few rows together (their lengths may differ), then large
    copies (which a model that gives every copy the full bandwidth does not reward)."""
    fitting = [b for b in candidates(problem, chip) if vmem_bytes(problem, b) <= tuned.budget(chip) // 2]
    if not fitting:
        return Blocks(LANES, 2)
    costs = {b: cycles(problem, b, chip) for b in fitting if b.depth > 2} or {fitting[0]: 0.0}
    close = [b for b in costs if costs[b] <= 1.02 * min(costs.values())]
    return min(close, key=lambda b: (b.splits, b.rows, -b.kv, b.depth))


def _reach(problem: Problem) -> int:
    """Slots of a full row that are live."""
    if problem.left is None or problem.ring:
        return problem.slots
    return min(problem.slots, problem.left + problem.tokens)


# Fitted to the compiler's schedules for v5e and v6e: what a chunk costs however small (chains of a matrix unit, a
# maximum over lanes, a power, a sum, a matrix unit), a row's masks, and a tile of 128 slots by 256 of K and V.
_STEP, _ROW, _TILE = 900, 75, 18
_COPY_SECONDS = 0.55e-6
_MERGE = 3000


def cycles(problem: Problem, blocks: Blocks, chip: Chip) -> float:
    """About what a call takes, every row being full: the longer of copies and arithmetic, chunk by chunk."""
    p = problem
    reach = -(-_reach(p) // blocks.splits)
    slots = min(blocks.kv, reach)
    clock = chip.clock
    copied = blocks.rows * slots * _slot_bytes(p) * clock * chip.cores / chip.bandwidth
    tiles = -(-slots // LANES)
    wide = -(-p.head_dim // chip.mxu) + -(-p.value_dim // chip.mxu)
    passes = 6 if p.compute == "float32" else 1
    products = passes * p.rows * wide * LANES * chip.mxu / (chip.mxus * chip.macs)
    vectors = -(-p.rows // 8) * 5
    head = tiles * max(_TILE * passes * (p.head_dim + p.value_dim) / 256, products, vectors)
    work = _STEP + blocks.rows * (_ROW + p.kv_heads * head)
    latency = _COPY_SECONDS * clock
    step = max(copied, work, (latency + copied) / (blocks.depth - 1))
    steps = p.batch // blocks.rows * blocks.splits * -(-reach // blocks.kv) / cores(p, blocks, chip)
    return latency + copied + work + steps * step + (_MERGE if blocks.splits > 1 else 0)
