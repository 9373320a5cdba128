"""Contexts to align and to compare on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxinf.training.data import Documents
from pallas_kernels.errors import InputError


def encode(texts: Iterable[str], encode: Callable[[str], Sequence[int]], opener: int | None) -> Documents:
    """Documents of any tokenizer: int32 tokens, each text behind the token `opener` if there is one.

    Args:
      encode: of a text to its ids, without special tokens.
    """
    rows, size = [], 0
    for text in texts:
        rows.append(np.array([*([] if opener is None else [opener]), *encode(text)], np.int32))
        size += len(text.encode())
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Documents(np.concatenate(rows) if rows else np.zeros(0, np.int32), starts, size)


def split(documents: Documents, share: float = 0.05) -> tuple[Documents, np.ndarray]:
    """`(what is trained on, tokens held out)`: the last `share` of the tokens, of one document or of several."""
    kept = len(documents.tokens) - int(len(documents.tokens) * share)
    starts = documents.starts[documents.starts < kept]
    part = Documents(documents.tokens[:kept], np.append(starts, kept), documents.bytes)
    return part, documents.tokens[kept:]


def spread(tokens: np.ndarray, rows: int, length: int) -> np.ndarray:
    """`rows` pieces of `length` tokens that lie evenly in a text, int32 `[rows, length]`; fewer where the text
    does not hold as many side by side.

    Raises:
      InputError: the text does not hold one.
    """
    rows = min(rows, len(tokens) // length)
    if rows < 1:
        raise InputError(f"{len(tokens)} tokens of held-out text are fewer than one piece of {length}: give more")
    starts = np.linspace(0, len(tokens) - length, rows).astype(np.int64)
    return np.asarray(tokens)[starts[:, None] + np.arange(length)].astype(np.int32)


def distinct_share(row: np.ndarray, n: int = 4) -> float:
    """Different n-grams of a row of tokens, as a share of all: low where a model repeats itself."""
    grams = np.lib.stride_tricks.sliding_window_view(row, min(n, len(row)))
    return len(np.unique(grams, axis=0)) / len(grams)
