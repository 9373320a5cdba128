"""Block sizes of `flash_attention`."""

from dataclasses import dataclass

from pallas_kernels.errors import InputError

SCORES = 1 << 20  # scores of one pair of blocks, all rows and heads together, that a CPU's cache still serves


@dataclass(frozen=True)
class Blocks:
    """Queries and keys that are worked on at a time."""

    q: int
    kv: int

    def __post_init__(self):
        if self.q < 1 or self.kv < 1:
            raise InputError(f"blocks={self}, but both sizes must be 1 or more.")


def default_blocks(rows: int, queries: int, keys: int) -> Blocks:
    """Block sizes for the XLA form; `rows` is the batch times the query heads.

    Short inputs are one block: its scores are made at once, with no loop.
    """
    if queries * keys <= 1 << 18:
        return Blocks(queries, keys)
    return Blocks(min(queries, 256), min(keys, 512))
