"""A few sizes for many lengths, so that few programs serve all prompts."""

from __future__ import annotations

from jaxinf.generation.loop import PIECE

LEAST_PIECE, LEAST_CAPACITY = 16, 256


def piece_size(tokens: int) -> int:
    """Columns of a pass over `tokens` tokens: the next power of two, at least 16."""
    return max(LEAST_PIECE, 1 << (tokens - 1).bit_length())


def pieces(tokens: int, *, whole: bool = False) -> list[tuple[int, int]]:
    """`(start, columns)` of the passes over a prompt: whole pieces, then the remainder's size; or, if asked, one.

    The pieces depend on the number of tokens alone, and a shorter row's first pieces are those it has alone.
    """
    if whole:
        return [(0, piece_size(tokens))]
    parts = [(start, PIECE) for start in range(0, tokens - PIECE + 1, PIECE)]
    done = len(parts) * PIECE
    return parts if done == tokens else [*parts, (done, piece_size(tokens - done))]


def capacity(tokens: int, limit: int | None = None) -> int:
    """Slots for `tokens`: 256, 384, 512, 768, 1024, ..., at most half again as many; never more than `limit`."""
    size = LEAST_CAPACITY
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if limit is None else max(min(size, limit), tokens)
