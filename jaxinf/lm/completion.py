"""What generation and scoring return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinf.generation import FinishReason


@dataclass(frozen=True)
class Drafting:
    """What drafting came to in one row.

    passes: of the target, after the one that read the prompt; plain: of these, without a draft.
    written: tokens that they gave, those cut off behind a stop string included.
    offered: by how many places ahead (from 1), passes whose draft went so far and stood up to there; accepted: in
      which that token stood too.
    drafter_share: part of the time that drafting took, by the costs measured beforehand; None: they do
      not tell drafting from verifying.
    """

    passes: int
    plain: int
    written: int
    offered: tuple[int, ...]
    accepted: tuple[int, ...]
    drafter_share: float | None = None

    @property
    def acceptance(self) -> tuple[float, ...]:
        """By place, the share of drafted tokens that stood, of those before which all stood."""
        return tuple(a / o if o else 0.0 for a, o in zip(self.accepted, self.offered, strict=True))


@dataclass(frozen=True)
class Stats:
    """Counts of one completion and its times; the rows of a batch share the times until they finish.

    prompt_tokens: of the prompt; cached_tokens: of these, how many were in the cache already (chat).
    new_tokens: in `Completion.tokens`.
    first_token_seconds: from the call to the first token, programs compiled on the way included.
    seconds: from the call to the end.
    drafting: None without a drafter.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float
    drafting: Drafting | None = None

    @property
    def passes(self) -> int:
        """Passes of the target, the one that read the prompt included."""
        return self.new_tokens if self.drafting is None else self.drafting.passes + 1

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each pass of the target after the first; 1 without a drafter."""
        d = self.drafting
        return 1.0 if d is None or d.passes == 0 else d.written / d.passes

    @property
    def drafter_seconds(self) -> float | None:
        """Of the time after the first token, what the drafter took by its costs; None: not known."""
        share = 0.0 if self.drafting is None else self.drafting.drafter_share
        return None if share is None else share * max(self.seconds - self.first_token_seconds, 0.0)

    @property
    def target_seconds(self) -> float | None:
        """Of the time after the first token, what the target took; None: not known."""
        drafter = self.drafter_seconds
        return None if drafter is None else max(self.seconds - self.first_token_seconds, 0.0) - drafter

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
