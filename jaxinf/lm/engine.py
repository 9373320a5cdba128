"""From requests to batches: the caches that they need, and whether a drafter serves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxinf.cache import Cache, Kind
from jaxinf.generation import Batch, Runner
from jaxinf.generation.speculative import SpeculativeBatch
from jaxinf.lm.drafting import Drafting
from jaxinf.lm.request import Facts, Request


@dataclass(frozen=True)
class Engine:
    """What runs for an `LM`. drafting: None: every token is a pass."""

    runner: Runner
    facts: Facts
    drafting: Drafting | None = None

    def begin(self, request: Request, cache: Cache | None = None, cached: int = 0) -> Batch | SpeculativeBatch:
        """Reads a request's prompts and writes the first token of each answer.

        Args:
          cache: that of a conversation, with the first `cached` tokens of the prompt; it is not drafted for. None:
            a new one.
        """
        prompts = request.prompts
        how: dict[str, Any] = dict(
            limits=request.limits,
            params=request.params,
            seeds=request.seeds,
            eos=request.eos,
            logprobs=request.logprobs,
            processors=request.processors,
            samples=request.samples,
        )
        if cache is None and self.drafting is not None and self.drafting.serves(request.tokens):
            rows = len(prompts) * request.samples
            speculator = self.drafting.of_rows(rows, self._draft_cache)
            return speculator.begin(prompts, self._draft_cache(rows, request.tokens, request), **how)
        if cache is None:
            rows = len(prompts) * (request.samples if self.runner.mesh is not None else 1)
            cache = self.new_cache(rows, request.tokens, request.window, request.sinks, request.cache)
        before = [p[:cached] for p in prompts] if cached else None
        return self.runner.begin([p[cached:] for p in prompts], cache, cached=before, **how)

    def new_cache(
        self,
        rows: int,
        tokens: int,
        window: int | None,
        sinks: int,
        kind: Kind | None,
        max_append: int = 1,
        spare: int = 0,
    ) -> Cache:
        """As `Runner.new_cache`. spare: tokens of a row beyond those that the context bounds."""
        options: Any = dict(window=window, sinks=sinks, kind=kind, max_append=max_append)
        return self.runner.new_cache(rows, tokens + spare, limit=self.facts.context + spare, **options)

    def measure_drafting(self) -> None:
        """What drafting costs for one row, if it is to adapt to that."""
        if self.drafting is not None:
            self.drafting.of_rows(1, self._draft_cache)

    def _draft_cache(self, rows: int, tokens: int, request: Request | None = None) -> Cache:
        """A cache of the target for a pass over drafts."""
        assert self.drafting is not None
        asked = self.facts if request is None else request
        kept = (asked.window, asked.sinks, asked.cache)
        return self.new_cache(rows, tokens, *kept, self.drafting.max_append, self.drafting.spare)
