"""Block sizes of `flash_decode`."""

from dataclasses import dataclass

from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """Cache slots that are read at a time."""

    kv: int

    def __post_init__(self):
        if self.kv < 1:
            raise InputError(f"blocks={self}, but the size must be 1 or more.")


def default_blocks(slots: int) -> Blocks:
    """Block size for the XLA form."""
    return Blocks(min(slots, 256))
