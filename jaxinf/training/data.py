"""Documents to batches, as a pure function of the step: resuming needs the step alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxinf.training.tokenizer import end_of_text
from pallas_kernels.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Documents:
    """Tokens of many documents end to end, each opened by the end-of-text token.

    Attributes:
      tokens: uint16 `[total]`.
      starts: int64 `[documents + 1]`; document i is `tokens[starts[i] : starts[i + 1]]`.
      bytes: UTF-8 bytes of all documents.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int

    @classmethod
    def encode(cls, texts: Iterable[str], tokenizer: Tokenizer) -> Documents:
        """Encode each text behind the end-of-text token."""
        end = end_of_text(tokenizer)
        texts = list(texts)
        if tokenizer.get_vocab_size() > 2**16:
            raise InputError(
                f"a vocabulary of {tokenizer.get_vocab_size()} does not fit uint16: give at most 65536"
            )
        rows = [np.array([end, *e.ids], np.uint16) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        tokens = np.concatenate(rows) if rows else np.zeros(0, np.uint16)
        return cls(tokens, starts, sum(len(text.encode()) for text in texts))

    def save(self, folder: Path) -> None:
        """Write `tokens.npy` (uint16) and `starts.npy`, each beside its name and renamed."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in (("tokens", self.tokens), ("starts", self.starts), ("bytes", np.int64(self.bytes))):
            beside = folder / f"{name}.part.npy"
            np.save(beside, array, allow_pickle=False)
            beside.replace(folder / f"{name}.npy")

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """Read what `save` wrote."""
        try:
            tokens, starts, size = (
                np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("tokens", "starts", "bytes")
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no encoded corpus ({error}): encode it again") from error
        return cls(tokens, starts, int(size))


class Batches:
    """Rows of `context + 1` tokens: documents in a new order each epoch, end to end, cut, the cuts shuffled.

    Consecutive rows overlap by one token, so that each token of the epoch but the first is predicted once.
    What does not fill a last batch is left out of that epoch (another part in each).
    """

    def __init__(self, documents: Documents, *, batch: int, context: int, seed: int):
        self.documents, self.batch, self.context, self.seed = documents, batch, context, seed
        self.per_epoch = (len(documents.tokens) - 1) // context // batch
        if self.per_epoch < 1:
            raise InputError(
                f"{len(documents.tokens)} tokens do not fill a batch of {batch} x {context}: give more text, "
                "or a smaller batch or context"
            )
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 `[batch, context + 1]` of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.per_epoch)
        stream, order = self._load(epoch)
        starts = order[index * self.batch : (index + 1) * self.batch] * self.context
        return stream[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)

    def _load(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            tokens, starts = self.documents.tokens, self.documents.starts
            stream = np.concatenate([tokens[starts[i] : starts[i + 1]] for i in rng.permutation(len(starts) - 1)])
            order = rng.permutation((len(stream) - 1) // self.context)
            self._epoch = (epoch, stream, order)
        return self._epoch[1:]
