"""Tokens to text, piece by piece: whole characters only, and nothing that may belong to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, undecodable bytes as U+FFFD."""

_CONTEXT = 8
_INCOMPLETE = 3


class Detokenizer:
    """Text of tokens that come a few at a time.

    Decoders look back: a space may hang on the token before, a character may need four tokens. So the last
    tokens are decoded with those before them, and text whose last character is incomplete waits for more.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()):
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        # The text of ids[:given] is out, and they are decoded again with what follows them.
        self._given = len(self._ids)
        # A character that the prompt leaves incomplete is completed here.
        self._before = decode(self._ids).rstrip(REPLACEMENT)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; perhaps none."""
        self._ids.extend(tokens)
        # A token is at least a byte, and three bytes at most wait for a fourth: what still ends in U+FFFD
        # without the last three tokens is not incomplete but wrong.
        for cut in range(_INCOMPLETE + 1):
            end = len(self._ids) - cut
            if end <= self._given:
                return ""
            text = self._text(end)
            if text and (not text.endswith(REPLACEMENT) or cut == _INCOMPLETE):
                self._advance(end)
                return text
        return ""

    def finish(self) -> str:
        """The rest, an incomplete character as U+FFFD."""
        text = self._text(len(self._ids))
        self._advance(len(self._ids))
        return text

    def _text(self, end: int) -> str:
        return self._decode(self._ids[:end])[len(self._before) :]

    def _advance(self, end: int) -> None:
        del self._ids[: self._given]
        self._given = end - self._given
        self._before = self._decode(self._ids[: self._given])


class StopStrings:
    """Cuts text before the first of `stops`, across the pieces it comes in."""

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that can be given out now; after a stop string was `found`, none."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # Of several stop strings the one that ends first counts: it would have ended the text earlier.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop` but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
