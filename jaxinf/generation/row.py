"""One row of a batch on the host: its tokens, its text, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import Literal

import numpy as np

from jaxinf.generation.loop import Written
from jaxinf.generation.stream import Decode, Detokenizer, StopStrings

FinishReason = Literal["stop", "eos", "length", "interrupted"]


class Row:
    """Takes what the loop wrote for a row and gives out text that is certain.

    decode: None: the row has no text.
    prompt: what the text continues. eos: ids that end the row and are no text. limit: new tokens at most.
    """

    def __init__(
        self,
        decode: Decode | None,
        prompt: Sequence[int],
        *,
        eos: Container[int],
        limit: int,
        stops: Sequence[str] = (),
    ):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[dict[int, float]] = []
        self.finish_reason: FinishReason | None = None
        self.ended: float | None = None
        self._pieces: list[str] = []
        self._text = None if decode is None else Detokenizer(decode, prompt)
        self._stops = StopStrings(stops) if stops else None
        self._eos, self._limit = eos, limit

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def take(self, written: Written, row: int) -> str:
        """Adds row number `row` of `written`; the new text that is certain. A finished row takes no more."""
        if self.finish_reason is not None:
            return ""
        new = np.asarray(written.tokens[row, : written.counts[row]]).tolist()
        said: list[str] = []
        # A stop string ends the tokens where it ends, so it is looked for token by token.
        size = 1 if self._stops else max(len(new), 1)
        used = 0
        for at in range(0, len(new), size):
            part = new[at : at + size]
            used = at + len(part)
            ended = used == len(new) and part[-1] in self._eos
            said.append(self._push(part[:-1] if ended else part))
            if self._stops and self._stops.found is not None:
                self._finish("stop")
                break
            if ended:
                self._finish("eos")
        self.tokens += new[:used]
        if written.logprobs is not None:
            self.logprobs += np.asarray(written.logprobs[row, :used]).tolist()
        if written.top_ids is not None and written.top_logprobs is not None:
            ids, scores = (np.asarray(x[row, :used]).tolist() for x in (written.top_ids, written.top_logprobs))
            self.top += [dict(zip(i, s, strict=True)) for i, s in zip(ids, scores, strict=True)]
        if self.finish_reason is None and len(self.tokens) >= self._limit:
            self._finish("length")
        if self.finish_reason is not None:
            said.append(self._rest())
        return self._say(said)

    def interrupt(self) -> str:
        """Ends the row where it is; the text that was held back."""
        if self.finish_reason is not None:
            return ""
        self._finish("interrupted")
        return self._say([self._rest()])

    def _push(self, tokens: Sequence[int]) -> str:
        text = "" if self._text is None else self._text.push(tokens)
        return text if self._stops is None else self._stops.push(text)

    def _rest(self) -> str:
        text = "" if self._text is None else self._text.finish()
        if self._stops is None:
            return text
        text = self._stops.push(text)
        if self._stops.found is not None and self.finish_reason != "interrupted":
            self.finish_reason = "stop"
        return text + self._stops.finish()

    def _say(self, said: list[str]) -> str:
        text = "".join(said)
        if text:
            self._pieces.append(text)
        return text

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason, self.ended = reason, time.perf_counter()
