"""Block sizes of `ragged_paged_attention`: what there is to choose, what it costs in VMEM, and a rule."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chips import Chip
from pallas_kernels.errors import InputError
from pallas_kernels.ragged_paged_attention.pages import LANES
from pallas_kernels.tuned import budget

BLOCK_BYTES = 4 << 20
TILE_ROWS = 512  # of scores: query heads of a group times queries


@dataclass(frozen=True)
class Blocks:
    """Sizes of one call."""

    q: int  # tokens of a window, whose queries and results the kernel holds at a time
    q_tile: int  # queries of a chunk that are multiplied at a time
    pages: int  # of a block
    keys: int = 512  # of a block that a tile of a chunk is multiplied with at a time
    keys_one: int = 1024  # the same for a token alone
    buffers: int = 2  # blocks that are held or on their way
    run: int = 8  # pages that one copy takes where their ids follow each other

    def __post_init__(self):
        if min(self.q, self.q_tile, self.pages, self.keys, self.keys_one, self.run) < 1 or self.buffers < 2:
            raise InputError(f"blocks={self}, but every size must be 1 or more, and buffers 2 or more.")


@dataclass(frozen=True)
class Problem:
    """The static facts of a call."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    rows: int
    per_row: int
    page: int
    width: int
    dtype: str
    cache: str
    latent: bool
    scaled: bool
    return_lse: bool

    @property
    def compute_dtype(self):
        """Of the products: bfloat16 unless something is float32."""
        wide = "float32" in (self.dtype, self.cache)
        return jnp.dtype(jnp.float32 if wide else jnp.bfloat16)

    @property
    def key_lanes(self) -> int:
        """Lanes of a row that scores are computed from; queries are 0 in those beyond the key."""
        return _up(self.dim, LANES)

    @property
    def _value_first(self) -> int:
        return 0 if self.latent else self.width - self.value_dim

    @property
    def value_start(self) -> int:
        """First of the whole lanes of a row that hold the value."""
        return self._value_first // LANES * LANES

    @property
    def value_skip(self) -> int:
        """Lanes between `value_start` and the value."""
        return self._value_first - self.value_start

    @property
    def value_lanes(self) -> int:
        return _up(self.value_skip + self.value_dim, LANES)


def problem(arrays: Any, *, value_dim: int, latent: bool, return_lse: bool) -> Problem:
    tokens, heads, dim = arrays.q.shape
    groups, page, width = arrays.pages.shape[-3:]
    rows, per_row = arrays.page_table.shape
    return Problem(
        tokens,
        heads,
        groups,
        dim,
        value_dim,
        rows,
        per_row,
        page,
        width,
        arrays.q.dtype.name,
        arrays.pages.dtype.name,
        latent,
        arrays.page_scales is not None,
        return_lse,
    )


def bucket(problem: Problem) -> str:
    """Key of the tuned tables."""
    scale = "-latent" if problem.latent else ""
    return (
        f"{problem.dtype}-{problem.cache}-heads{problem.heads}-{problem.kv_heads}-dims{problem.dim}-"
        f"{problem.value_dim}{scale}-page{problem.page}-tokens{_power(problem.tokens)}-rows{_power(problem.rows)}"
    )


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """What the kernel holds in VMEM: pages on their way, two windows in and out, and the state of a window."""
    p, b = problem, blocks
    item = jnp.dtype(p.dtype).itemsize
    heads = _up(p.heads, 32 // item)
    page = p.kv_heads * _up(p.page, 8 * 4 // jnp.dtype(p.cache).itemsize) * p.width * jnp.dtype(p.cache).itemsize
    scales = (1 if p.latent else 2) * p.kv_heads * p.page * 4 if p.scaled else 0
    held = b.buffers * b.pages * (page + _up(scales, 512)) + b.pages * scales
    windows = 2 * b.q * heads * (_up(p.dim, LANES) + _up(p.value_dim, LANES)) * item
    if p.return_lse:
        windows += 2 * b.q * heads * LANES * 4
    share = p.heads // p.kv_heads
    state = p.key_lanes * p.compute_dtype.itemsize + (2 * LANES + p.value_lanes) * 4
    rows = p.kv_heads * (_up(share, 8) + b.q // b.q_tile * _up(share * b.q_tile, 8))
    wide = b.q_tile * _up(p.heads, 8) * max(p.key_lanes, p.value_lanes) * 4
    scores = max(_up(share, 8) * b.pages * p.page, share * b.q_tile * min(b.keys, b.pages * p.page)) * 4 * 4
    return held + windows + rows * state + wide + scores


def refusals(problem: Problem, blocks: Blocks) -> list[str]:
    """Why the kernel cannot work with these sizes."""
    total = blocks.pages * problem.page
    wrong = [
        f"{name}={size}, which must divide {total} and be a multiple of {_up(problem.page, LANES)}"
        for name, size in (("keys", blocks.keys), ("keys_one", blocks.keys_one))
        if total % size or size % problem.page or size % LANES
    ]
    if max(blocks.keys, blocks.keys_one) % min(blocks.keys, blocks.keys_one):
        wrong.append(f"keys={blocks.keys} and keys_one={blocks.keys_one}, one of which must divide the other")
    if blocks.q % blocks.q_tile or blocks.q_tile % 8:
        wrong.append(f"q_tile={blocks.q_tile}, which must divide q={blocks.q} and be a multiple of 8")
    return wrong


def candidates(problem: Problem, chip: Chip) -> list[Blocks]:
    """What a search tries: the rule's windows, with other blocks of pages and other tiles."""
    base = heuristic(problem, chip)
    found = {base}
    for keys in (512, 1024, 2048, 4096):
        for buffers in (2, 3):
            for tile in {base.q_tile, min(2 * base.q_tile, base.q), max(8, base.q_tile // 2)}:
                if base.q % tile == 0:
                    found.add(replace(_sized(problem, base.q, tile, keys), buffers=buffers))
    for keys in (256, 512, 1024, 2048):
        if base.pages * problem.page % keys == 0 and keys % max(LANES, problem.page) == 0:
            found |= {replace(base, keys=keys), replace(base, keys_one=keys)}
    return sorted(found, key=lambda b: (b.q, b.q_tile, b.pages, b.keys, b.keys_one, b.buffers, b.run))


def heuristic(problem: Problem, chip: Chip) -> Blocks:
    """Blocks of about 4 MiB, which take longer to arrive than to ask for; windows of 128 tokens for chunks, of 32
    where rows have a few tokens each; all of it smaller until it fits."""
    p = problem
    token = p.kv_heads * p.width * jnp.dtype(p.cache).itemsize
    keys = max(LANES, min(4096, _power(max(1, BLOCK_BYTES // token))))
    share = p.heads // p.kv_heads
    few = p.tokens <= 8 * p.rows
    q_tile = 8 if few else max(8, min(128, _power(TILE_ROWS // share)))
    q = min(32 if few else 128, _up(p.tokens, q_tile))
    while True:
        blocks = _sized(p, q, q_tile, keys)
        if vmem_bytes(p, blocks) <= budget(chip):
            return blocks
        if q > 8:
            q = _up(q // 2, 8)
            q_tile = min(q_tile, q)
        elif keys > LANES:
            keys //= 2
        else:
            raise InputError(
                f"q has {p.heads} heads of {p.dim} and a page is {p.kv_heads} x {p.page} x {p.width}, for which a "
                f"{chip.name}'s VMEM is too small: use smaller pages, or implementation='xla'."
            )


def _sized(problem: Problem, q: int, q_tile: int, keys: int) -> Blocks:
    """Blocks of about so many keys, whole pages and whole lanes, no more than the table asks for."""
    unit = max(LANES, problem.page)
    keys = min(_up(keys, unit), _power(-(-problem.per_row * problem.page // unit) * 2 - 1) * unit)
    pages = keys // problem.page
    # The matrix unit waits less with more keys at a time; a token alone has few rows to wait with.
    item = jnp.dtype(problem.cache).itemsize
    one = max(512, min(4096, _power(16384 // item // problem.kv_heads)))
    cuts = [cut * unit for cut in range(1, keys // unit + 1) if keys // unit % cut == 0]
    part_one = max(cut for cut in cuts if cut <= max(one, unit))
    part = max(cut for cut in cuts if cut <= max(512, unit) and part_one % cut == 0)
    return Blocks(q, q_tile, pages, part, part_one, 2, min(8, pages))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _power(value: int) -> int:
    """The largest power of two that is not above."""
    return 1 << (value.bit_length() - 1)
