"""The text that a model is calibrated with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxinf.layers.blockwise import block_tokens
from jaxinf.models import CausalLM, ModelSpec
from pallas_kernels.errors import InputError

LENGTH = 512
ROWS = 64


@dataclass(frozen=True)
class Calibration:
    """Rows of tokens that show a model what its matrices are given.

    tokens: int32 `[rows, length]`, each row a piece of text.
    batch: rows that pass through a layer at a time.
    """

    tokens: np.ndarray
    batch: int = 8

    def __post_init__(self):
        tokens = np.asarray(self.tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size or self.batch < 1:
            raise InputError(
                f"calibration tokens of shape {tokens.shape} and dtype {tokens.dtype}, {self.batch} at a time, "
                "must be integers [rows, length], and one row or more at a time"
            )
        object.__setattr__(self, "tokens", tokens.astype(np.int32))

    @classmethod
    def of_texts(
        cls,
        texts: Iterable[str],
        encode: Callable[[str], Sequence[int]],
        *,
        rows: int = ROWS,
        length: int = LENGTH,
        batch: int = 8,
    ) -> Calibration:
        """Texts end to end, cut into rows; read only as far as needed.

        Args:
          encode: text to token ids.
          rows, length: how much to take; what AWQ and GPTQ were published with is 128 of 512, and of 2048.

        Raises:
          InputError: the texts are too short; says how many tokens are needed.
        """
        needed = rows * length
        tokens = list(itertools.islice(itertools.chain.from_iterable(map(encode, texts)), needed))
        if len(tokens) < needed:
            raise InputError(
                f"the calibration text has {len(tokens)} tokens, but {rows} rows of {length} need {needed}: "
                "give more text, or ask for fewer or shorter rows"
            )
        return cls(np.asarray(tokens, np.int32).reshape(rows, length), batch)

    def fitted(self, spec: ModelSpec, widest: int) -> Calibration:
        """The same, with no more rows at a time than pass a layer at once.

        Args:
          widest: input channels of the widest matrix to be calibrated.

        Raises:
          InputError: fewer tokens than that, rows that are longer than the context, or unknown tokens.
        """
        rows, length = self.tokens.shape
        if self.tokens.size < widest:
            raise InputError(
                f"the calibration text has {self.tokens.size} tokens, too few to tell {widest} channels apart: "
                f"give {widest} at least, ten times as many are better"
            )
        most = min(block_tokens(layer.ffn.token_bytes(spec.d_model)) for layer in spec.layers())
        if length > min(spec.context, most):
            raise InputError(
                f"calibration rows have {length} tokens; cut them to {min(spec.context, most)} at most, which fit "
                "the context and pass a layer at once"
            )
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if low < 0 or high >= spec.vocab:
            raise InputError(f"calibration tokens are {low} to {high}; they must be 0 to {spec.vocab - 1}")
        return dataclasses.replace(self, batch=max(1, min(self.batch, rows, most // length)))

    def hidden(self, model: CausalLM) -> list[np.ndarray]:
        """What the first layer gets, some rows at a time: `[batch, length, d_model]` in the model's dtype, on the
        host. Of the model only what comes before its layers is read: the rest may be abstract."""
        found = []
        for start in range(0, len(self.tokens), self.batch):
            tokens = jnp.asarray(self.tokens[start : start + self.batch])
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            found.append(np.asarray(model.embedded(tokens, positions)))
        return found
