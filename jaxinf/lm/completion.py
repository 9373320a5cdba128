"""What generation and scoring return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinf.generation import FinishReason


@dataclass(frozen=True)
class Stats:
    """Counts of one completion and its times; the rows of a batch share the times until they finish.

    prompt_tokens: of the prompt; cached_tokens: of these, how many were in the cache already (chat).
    new_tokens: in `Completion.tokens`.
    first_token_seconds: from the call to the first token, programs compiled on the way included.
    seconds: from the call to the end.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after the first one; 0 where there are fewer than two."""
        rest = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / rest if self.new_tokens > 1 and rest > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """One answer.

    text: what follows the prompt, without a final eos and cut before a stop string; "" without a tokenizer.
    tokens: the new ids alone; a final eos is among them, and so are the tokens of a stop string.
    finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens or the context), "interrupted" (Ctrl-C).
    logprobs: float32 `[new]`, log-probabilities of the tokens under the model itself, before temperature and the
      like; None unless asked for. top_logprobs: of each token's likeliest alternatives, by id, best first.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    logprobs: np.ndarray | None = None
    top_logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    tokens: ids of the text, a bos that the tokenizer puts before it included.
    logprobs: float32 `[len(tokens) - 1]`, natural logarithms, of every token but the first.
    bits_per_byte: what the text costs as code, per byte of its UTF-8; without a bos before it the first token
      counts log2(vocab) bits. None for a text given as ids.
    """

    tokens: list[int]
    logprobs: np.ndarray
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return float(np.exp(-np.mean(self.logprobs, dtype=np.float64)))
