"""Rows that heads are trained on: text, and what the target wrote itself."""

from __future__ import annotations

import numpy as np

from jaxinf.training.data import Batches
from jaxinf.training.loop import pieces
from pallas_kernels.errors import InputError


class Rows:
    """Batches of either kind, as a pure function of the step.

    Args:
      batches: text.
      own: int32 `[N, L + 1]`, rows by the target; None: text alone.
      share: part of the steps, of [0, 1], that take `own`.
    """

    def __init__(self, batches: Batches, own: np.ndarray | None = None, share: float = 0.5):
        if not 0 <= share <= 1:
            raise InputError(f"share={share} must be between 0 and 1")
        self.batches, self.own = batches, own
        self.share = 0.0 if own is None else share

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batches.batch * self.batches.context

    def get(self, step: int, length: int) -> np.ndarray:
        """int32 `[B, T + 1]` of a step from 0 on; of text, T is `length`."""
        before, after = (int(n * self.share) for n in (step, step + 1))
        if self.own is None or before == after:
            return pieces(self.batches[step - before], length)
        count = min(len(self.own), max(1, self.tokens // (self.own.shape[1] - 1)))
        epoch, index = divmod(before, len(self.own) // count)
        order = np.random.default_rng([self.batches.seed, epoch, 1]).permutation(len(self.own))
        return self.own[order[index * count : (index + 1) * count]]
