"""Scoring of texts of any length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxinf.cache import Cache
from jaxinf.generation import Runner, target_logprobs
from jaxinf.generation.buckets import pieces
from jaxinf.lm.completion import Score
from pallas_kernels.errors import InputError
from sharding.program import OWN, ROWS, SAME, gather_rows

_ROWS = 8


class Scorer:
    """The programs that score; see `LM.score`."""

    def __init__(self, runner: Runner):
        def plain(model, x, y, counts):
            return gather_rows(target_logprobs(model, x, y, counts)[0])

        def cached(model, x, y, counts, cache, *, fresh):
            scores, cache = target_logprobs(model, x, y, counts, cache, fresh=fresh)
            return gather_rows(scores), cache

        self._plain = runner.bind(plain, (ROWS, ROWS, ROWS), SAME)
        takes = (ROWS, ROWS, ROWS, OWN)
        self._cached = runner.bind(cached, takes, (SAME, OWN), static=("fresh",))
        self._ways = runner.row_ways

    def windowed(self, ids: Sequence[int], context: int, stride: int | None, *, padded: bool = True) -> np.ndarray:
        """Log-probabilities float32 `[len(ids) - 1]`, each token with what a piece of `context` tokens shows.

        padded: pieces may be padded and share a batch; not so where tokens compete with those beside them.
        """
        _check_length(ids)
        if stride is None:
            stride = max(context // 2, 1)
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= context:
            raise InputError(f"stride={stride!r} must be from 1 to the context, {context}")
        n = len(ids) - 1
        size = min(context, max(64, 1 << (n - 1).bit_length()) if padded else n)
        starts = [0, *range(stride, max(n - context, 0) + stride, stride)]
        starts = [min(s, max(n - size, 0)) for s in starts] if n > context else [0]
        found = np.zeros((n,), np.float32)
        x, y = np.asarray(ids[:-1], np.int32), np.asarray(ids[1:], np.int32)
        rows = min(_ROWS, len(starts)) if padded else 1
        filled = rows + -rows % self._ways
        done = 0
        for i in range(0, len(starts), rows):
            group = starts[i : i + rows]
            inputs, targets = np.zeros((2, filled, size), np.int32)
            counts = np.zeros((filled,), np.int32)
            for row, start in enumerate(group):
                part = x[start : start + size]
                inputs[row, : len(part)], targets[row, : len(part)] = part, y[start : start + size]
                counts[row] = len(part)
            scores = np.asarray(self._plain(inputs, targets, counts))
            for row, start in enumerate(group):
                end = start + counts[row]
                found[done:end] = scores[row, done - start : counts[row]]
                done = end
        return found

    def streamed(self, ids: Sequence[int], cache: Cache) -> np.ndarray:
        """The same, reading once from start to end through a cache, which is donated."""
        _check_length(ids)
        x, y = np.asarray([ids[:-1]], np.int32), np.asarray([ids[1:]], np.int32)
        found = []
        for start, size in pieces(x.shape[1]):
            count = min(size, x.shape[1] - start)
            pad = ((0, self._ways - 1), (0, size - count))
            inputs, targets = (np.pad(z[:, start : start + count], pad) for z in (x, y))
            counts = np.asarray([count] + [0] * (self._ways - 1), np.int32)
            scores, cache = self._cached(inputs, targets, counts, cache, fresh=start == 0)
            assert cache is not None
            found.append(np.asarray(scores)[0, :count])
        return np.concatenate(found)


def summary(ids: list[int], logprobs: np.ndarray, size: int | None, bos: int | None, vocab: int) -> Score:
    """size: bytes of the text, or None. bos: the id that begins every text, where there is one."""
    bits = None
    if size is not None:
        total = -float(np.sum(logprobs, dtype=np.float64)) / math.log(2)
        if ids[0] != bos:
            total += math.log2(vocab)
        bits = total / size
    return Score(tokens=ids, logprobs=logprobs, bits_per_byte=bits)


def _check_length(ids: Sequence[int]) -> None:
    if len(ids) < 2:
        raise InputError("the text is a single token, and the first has nothing to be predicted from; give more")
