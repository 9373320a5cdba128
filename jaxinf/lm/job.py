"""One call of generate, stream or chat while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator

import numpy as np

from jaxinf.generation import WIDTH, Batch, Row
from jaxinf.generation.speculative import SpeculativeBatch
from jaxinf.lm.completion import Completion, Drafting, Stats
from jaxinf.lm.request import Request
from jaxinf.lm.tokenizer import Tokenizer

STREAMED = {"seconds": 0.05, "steps": 1}
"""The pace of a job whose text is read as it is written."""


class Job:
    """Runs a batch to its end and keeps what its rows wrote.

    start: prefills and draws the first tokens. seconds: how long one call of the decode loop should take, so
    that text appears, stop strings act and Ctrl-C is heard in time. steps: tokens of the first call.
    ended: called with the job once `run` has come to its end, Ctrl-C included.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        start: Callable[[], Batch | SpeculativeBatch],
        *,
        cached: int = 0,
        seconds: float = 0.5,
        steps: int = 16,
        ended: Callable[[Job], None] | None = None,
    ):
        self._begun = time.perf_counter()
        self._start, self._seconds, self._steps, self._ended = start, seconds, steps, ended
        self._request, self._cached = request, cached
        self._first: float | None = None
        decode = None if tokenizer is None else tokenizer.decode
        prompts = [p for p in request.prompts for _ in range(request.samples)]
        self._prompts = prompts
        self.rows = [
            Row(decode, prompt, eos=request.eos, limit=limit, stops=request.stops)
            for prompt, limit in zip(prompts, request.limits, strict=True)
        ]
        self.emitted: list[list[int]] = [[] for _ in prompts]
        """All that the device emitted, tokens after a stop string included."""
        self.batch: Batch | SpeculativeBatch | None = None

    def run(self) -> Generator[tuple[int, str], None, None]:
        """`(row, new text)` as text becomes certain. A KeyboardInterrupt inside ends the rows and the iteration."""
        try:
            self.batch = self._start()
            self._first = time.perf_counter()
            yield from self._take()
            steps = self._steps
            while not all(row.finish_reason for row in self.rows):
                halt = np.asarray([row.finish_reason is not None for row in self.rows])
                left = max(
                    limit - len(row.tokens)
                    for row, limit in zip(self.rows, self._request.limits, strict=True)
                    if row.finish_reason is None
                )
                steps = min(steps, left, WIDTH)
                before = time.perf_counter()
                self.batch.advance(steps, halt)
                pace = (time.perf_counter() - before) / steps
                steps = max(1, min(int(self._seconds / pace), 2 * steps))
                yield from self._take()
        except KeyboardInterrupt:
            yield from self.interrupt()
        if self._ended is not None:
            self._ended(self)

    def finish(self) -> list[Completion]:
        """Runs to the end, or to a KeyboardInterrupt; what each row wrote."""
        try:
            for _ in self.run():
                pass
        except KeyboardInterrupt:  # between two pieces
            self.interrupt()
        return self.completions()

    def interrupt(self) -> list[tuple[int, str]]:
        """Ends the rows where they are: `(row, text that was held back)`."""
        return [(i, text) for i, row in enumerate(self.rows) if (text := row.interrupt())]

    def _take(self) -> Iterator[tuple[int, str]]:
        assert self.batch is not None
        written = self.batch.written
        for i, row in enumerate(self.rows):
            self.emitted[i] += np.asarray(written.tokens[i, : written.counts[i]]).tolist()
            if text := row.take(written, i):
                yield i, text

    def completions(self) -> list[Completion]:
        """What each row wrote, after `run` has ended."""
        rows = zip(self.rows, self._prompts, strict=True)
        return [self._completion(i, row, prompt) for i, (row, prompt) in enumerate(rows)]

    def _completion(self, number: int, row: Row, prompt: list[int]) -> Completion:
        now = time.perf_counter()
        first = self._first or now
        stats = Stats(
            prompt_tokens=len(prompt),
            cached_tokens=self._cached,
            new_tokens=len(row.tokens),
            first_token_seconds=first - self._begun,
            seconds=max(row.ended or now, first) - self._begun,
            drafting=self._drafting(number),
        )
        asked = self._request.logprobs
        return Completion(
            text=row.text,
            tokens=row.tokens,
            finish_reason=row.finish_reason or "interrupted",
            stats=stats,
            logprobs=None if asked is None else np.asarray(row.logprobs, np.float32),
            top_logprobs=row.top if asked else None,
        )

    def _drafting(self, row: int) -> Drafting | None:
        batch = self.batch
        if not isinstance(batch, SpeculativeBatch):
            return None
        tally, costs = batch.tally, batch.costs
        passes, plain = int(tally.passes[row]), int(tally.plain[row])
        offered, accepted = (tuple(int(n) for n in x[row]) for x in (tally.offered, tally.accepted))
        share = None
        if costs is not None and passes and batch.separable:
            drafting = (passes - plain) * float(costs.fixed) + float(costs.token) * sum(offered)
            share = drafting / (drafting + plain + (passes - plain) * float(costs.verify))
        return Drafting(passes, plain, len(self.emitted[row]) - 1, offered, accepted, share)


class Stream:
    """An iterator over pieces of text; afterwards `completion` holds the whole answer."""

    def __init__(self, job: Job):
        self._job = job
        self._pieces = job.run()
        self.completion: Completion | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)[1]
        except StopIteration:
            self.completion = self._job.completions()[0]
            raise

    def stop(self) -> str:
        """Ends the answer where it is, if it has not ended: the text that was held back. Sets `completion`."""
        text = "".join(text for _, text in self._job.interrupt())
        self._pieces.close()
        self.completion = self._job.completions()[0]
        return text
