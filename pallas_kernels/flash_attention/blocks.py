"""Block sizes of the Pallas kernel of `flash_attention`."""

from dataclasses import dataclass, replace

from pallas_kernels import tuned
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.errors import InputError
from pallas_kernels.flash_attention.schedule import MAX_TILES

LANES = 128
SMALLEST = 16  # queries of a block: a tile of 16-bit numbers has 16 rows


@dataclass(frozen=True)
class Problem:
    """The static facts of a call."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str
    causal: bool = True
    window: int | None = None  # keys that a query sees at most, where a window limits both sides
    per_head_masks: bool = False  # the block mask differs between heads: one head at a time
    lists: int = 1  # lists of steps: the rows, and blocks of heads, whose masks differ
    mask_bytes: int = 0  # of arrays that stay in VMEM: ancestors and the cells of a block mask

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def share(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Blocks:
    """What the kernel works on at a time.

    Attributes:
      q, kv: queries and keys that are copied together.
      heads: query heads of one key head that are worked on together; rounded down to a divisor.
      tile_q, tile_kv: what masks are decided for; tile_kv is also how many keys one product covers. tile_q is a
        power of two of 16 or more.
      width: query columns (of all heads together) that one product covers.
      ahead: how many products of queries and keys are begun before the softmax of the first one.
      ones: whether the matrix unit sums the weights, by rows of ones under the values; else the vector unit.
    """

    q: int
    kv: int
    heads: int
    tile_q: int
    tile_kv: int
    width: int
    ahead: int
    ones: bool = True

    def __post_init__(self):
        reasons = []
        if min(self.q, self.kv, self.heads, self.tile_q, self.tile_kv, self.width) < 1 or self.ahead < 0:
            reasons.append("every size must be 1 or more")
        elif self.tile_q < SMALLEST or self.tile_q & (self.tile_q - 1):
            reasons.append("tile_q must be a power of two of 16 or more")
        elif self.q % self.tile_q or self.kv % self.tile_kv or self.tile_kv % LANES:
            reasons.append("q must be a multiple of tile_q, kv of tile_kv, and tile_kv of 128")
        elif self.q // self.tile_q * (self.kv // self.tile_kv) > MAX_TILES:
            reasons.append(f"q x kv must be at most {MAX_TILES} tiles")
        elif self.width % self.tile_q and self.tile_q % self.width:
            reasons.append("one of width and tile_q must be a multiple of the other")
        if reasons:
            raise InputError(f"blocks={self}, but {'; '.join(reasons)}.")

    def fit(self, problem: Problem) -> "Blocks":
        """The same, with no more heads, queries and keys than there are."""
        most = 1 if problem.per_head_masks else min(self.heads, problem.share)
        heads = next(n for n in range(most, 0, -1) if problem.share % n == 0)
        q = min(self.q, max(SMALLEST, power_above(problem.queries)))
        tile_kv = min(self.tile_kv, -(-problem.keys // LANES) * LANES)
        kv = min(self.kv, -(-problem.keys // tile_kv) * tile_kv)
        return replace(self, q=q, kv=kv, heads=heads, tile_q=min(self.tile_q, q), tile_kv=tile_kv)


def power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def bucket(problem: Problem) -> str:
    """Key of the tuned tables."""
    p = problem
    window = "" if p.window is None else f" window {power_above(p.window)}"
    return (
        f"{p.dtype} heads {p.share} dims {p.head_dim}/{p.value_dim} queries {power_above(p.queries)} "
        f"keys {power_above(p.keys)}{' causal' if p.causal else ''}{window}"
    )


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """What the kernel holds in VMEM: copies in flight, scratch and the scores being worked on."""
    p, b = problem, blocks.fit(problem)
    columns = b.heads * b.q
    dim, value = (-(-n // LANES) * LANES for n in (p.head_dim, p.value_dim))
    copied = 2 * p.itemsize * (columns * (dim + value) + b.kv * (dim + value))
    scratch = p.itemsize * (columns * dim + b.kv * (dim + value + 16)) + 4 * columns * (value + 16)
    scores = 4 * (b.ahead + 2) * b.tile_kv * max(b.width, LANES) * (3 if p.itemsize == 4 else 2)
    return copied + scratch + scores + p.mask_bytes


def smem_bytes(problem: Problem, blocks: Blocks) -> int:
    """The lists of steps: two numbers for each pair of blocks."""
    b = blocks.fit(problem)
    return 8 * problem.lists * -(-problem.queries // b.q) * -(-problem.keys // b.kv)


def heuristic(problem: Problem, chip: Chip) -> Blocks:
    """Many query columns (4096, or 8192 on wide matrix units) against 1024 keys, in tiles of 256 x 256.

    The products of such a block keep the matrix units busy while its first scores and its last weights are made.
    Windows narrower than a tile get tiles of 128. float32 takes six passes, so that a quarter of a block is as much
    work (and code). Less where VMEM is short.
    """
    wide = chip.mxu > LANES
    ahead = 6 if wide else 3
    heads = _heads(problem)
    columns = 8192 if wide and problem.head_dim <= LANES else 4096
    narrow = problem.window is not None and problem.window < 256
    tile, most_q, kv = (LANES, 512, 512) if narrow else (256, 1024, 1024)
    if problem.itemsize == 4:
        columns, kv = 2048, 512
    q = max(tile, min(most_q, columns // power_above(heads)))
    blocks = Blocks(q, kv, heads, tile, tile, tile, ahead, wide).fit(problem)
    while vmem_bytes(problem, blocks) > tuned.budget(chip):
        smaller = _smaller(blocks)
        if smaller is None:
            break
        blocks = smaller.fit(problem)
    while smem_bytes(problem, blocks) > chip.smem // 2:
        # Longer blocks of more coarse tiles: the lists of a long text in a batch would not fit.
        wider = replace(blocks, kv=2 * blocks.kv, tile_kv=2 * blocks.tile_kv)
        if blocks.kv > blocks.q:
            wider = replace(blocks, q=2 * blocks.q, tile_q=2 * blocks.tile_q)
        if vmem_bytes(problem, wider) > tuned.budget(chip):
            break
        blocks = wider
    return blocks


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """Why the kernel cannot work with these sizes: any are fitted to the call, but lists may be too long."""
    need, most = smem_bytes(problem, blocks), min(chip.smem for chip in CHIPS.values()) * 3 // 4
    return [] if need <= most else [f"lists of {need} bytes are more than {most} bytes of SMEM"]


def _heads(problem: Problem) -> int:
    most = 1 if problem.per_head_masks else 8
    return next(n for n in range(most, 0, -1) if problem.share % n == 0)


def _smaller(blocks: Blocks) -> Blocks | None:
    b = blocks
    if b.kv > 2 * b.tile_kv:
        return replace(b, kv=b.kv // 2 // b.tile_kv * b.tile_kv)
    if b.heads > 2:
        return replace(b, heads=b.heads // 2)
    if b.q > b.tile_q:
        return replace(b, q=b.q // 2)
    if b.kv > b.tile_kv:
        return replace(b, kv=b.tile_kv)
    return replace(b, heads=1) if b.heads > 1 else None


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """What a search tries, the likely ones first."""
    wide = chip.mxu > LANES
    found = {heuristic(problem, chip): None}
    heads = _heads(problem)
    shapes = [(1024, 1024), (512, 1024), (1024, 512), (512, 512), (2048, 512), (512, 2048), (256, 512), (256, 256)]
    tiles = [(256, 256, 256), (128, 128, 128), (256, 256, 512), (512, 256, 256)]
    for tile_q, tile_kv, width in tiles:
        for q, kv in shapes:
            for ahead in (6, 3) if wide else (3, 6):
                if q // tile_q * (kv // tile_kv) in range(1, MAX_TILES + 1):
                    found[Blocks(q, kv, heads, tile_q, tile_kv, width, ahead, wide).fit(problem)] = None
    return list(found)
