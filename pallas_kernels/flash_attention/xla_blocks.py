"""Block sizes of the XLA form of `flash_attention`."""

from dataclasses import dataclass

from pallas_kernels.errors import InputError

# Scores that are worked on at a time: on a CPU they should stay in its second-level cache (4 bytes each), on an
# accelerator they should fill it and fit beside the model.
CPU_SCORES = 1 << 18
GPU_SCORES = 1 << 26
CPU_BLOCK = 128
GPU_BLOCK = 512


@dataclass(frozen=True)
class XlaBlocks:
    """What is worked on at a time: queries, keys, rows of the batch and key heads (None: all of them).

    Rows and heads are rounded down to divisors of what there is.
    """

    q: int
    kv: int
    rows: int | None = None
    heads: int | None = None

    def __post_init__(self):
        if any(size is not None and size < 1 for size in (self.q, self.kv, self.rows, self.heads)):
            raise InputError(f"blocks={self}, but every size must be 1 or more.")

    def fit(self, batch: int, groups: int, queries: int, keys: int) -> "XlaBlocks":
        """The same, none larger than what there is."""
        return XlaBlocks(
            min(self.q, queries),
            min(self.kv, keys),
            _divisor(batch, self.rows or batch),
            _divisor(groups, self.heads or groups),
        )


def default_blocks(platform: str, batch: int, groups: int, share: int, queries: int, keys: int) -> XlaBlocks:
    """Block sizes for the XLA form; `share` query heads go with each of `groups` key heads."""
    if platform == "cpu":
        side, budget = CPU_BLOCK, CPU_SCORES
    else:
        side, budget = GPU_BLOCK, GPU_SCORES
    if batch * groups * share * queries * keys <= budget:
        return XlaBlocks(queries, keys)
    kv = min(side, keys)
    q = max(1, min(side, queries, budget // (share * kv)))
    heads = _divisor(groups, budget // (share * q * kv))
    rows = _divisor(batch, budget // (groups * share * q * kv)) if heads == groups else 1
    return XlaBlocks(q, kv, rows, heads)


def _divisor(whole: int, at_most: int) -> int:
    """The largest divisor of `whole` that is at most `at_most`, or 1."""
    return next(d for d in range(max(1, min(whole, at_most)), 0, -1) if whole % d == 0)
