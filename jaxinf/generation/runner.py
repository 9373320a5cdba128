"""The host's side of generation: a model's programs, and a batch under way."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.cache import Cache
from jaxinf.generation import buckets, loop
from jaxinf.generation.sampling import Controls, Processor, SamplingParams
from jaxinf.models import CausalLM
from jaxinf.models.causal_lm import init_cache

WIDTH = 64
"""Tokens a row that one call of the decode loop may write."""

_NO_WINDOW_LIMIT = 2**30


class Runner:
    """A model split once into weights and structure, and the programs that take the weights as a flat list.

    Flat lists dispatch in a fraction of a millisecond; a module as an argument costs milliseconds a call.
    """

    def __init__(self, model: CausalLM):
        self.spec, self.layout, self.dtype = model.spec, model.layout, model.dtype
        graph, state = nnx.split(model)
        self.weights, tree = jax.tree.flatten(state)

        def merge(weights) -> CausalLM:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))

        self._merge = merge

        @functools.partial(jax.jit, static_argnames="fresh", donate_argnames=("cache", "logits"))
        def append(weights, tokens, counts, cache, logits, *, fresh):
            return loop.append_piece(merge(weights), tokens, counts, cache, logits, fresh=fresh)

        static = ("width", "logprobs", "processors")

        @functools.partial(jax.jit, static_argnames=static, donate_argnames="state")
        def decode(weights, state, steps, halt, eos, controls, *, width, logprobs, processors):
            return loop.decode(
                merge(weights),
                state,
                steps=steps,
                halt=halt,
                eos=eos,
                controls=controls,
                width=width,
                logprobs=logprobs,
                processors=processors,
            )

        self._append, self._decode = append, decode

    @property
    def model(self) -> CausalLM:
        """The module again; it shares the weights."""
        return self._merge(self.weights)

    def bind(self, function, **jit_options):
        """`jit` of `function(model, *args)` as a function of `args`; the weights travel flat."""

        @functools.partial(jax.jit, **jit_options)
        def flat(weights, *args, **kwargs):
            return function(self._merge(weights), *args, **kwargs)

        return functools.partial(flat, self.weights)

    def new_cache(
        self, batch: int, tokens: int, *, limit=None, window: int | None = None, sinks: int = 0, max_append: int = 1
    ) -> Cache:
        """An empty cache with room for `tokens` a row, rounded up to a bucket below `limit`.

        With a `window`, memory is bounded whatever `tokens` is.
        """
        size = _NO_WINDOW_LIMIT if window is not None else buckets.capacity(tokens, limit)
        return _empty_cache(
            self.spec, batch, size, jnp.dtype(self.dtype).name, self.layout, max_append, window, sinks
        )

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Cache, *, fresh: bool) -> tuple[jax.Array, Cache]:
        """Appends prompts piece by piece: `(logits float32 [B, V], cache)`. The cache is donated."""
        lengths = np.asarray([len(p) for p in prompts], np.int32)
        parts = buckets.pieces(int(lengths.max()), whole=self.spec.reads_prompts_whole)
        padded = np.zeros((len(prompts), parts[-1][0] + parts[-1][1]), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        logits = jnp.zeros((len(prompts), self.spec.vocab), jnp.float32)
        for start, size in parts:
            counts = np.clip(lengths - start, 0, size)
            tokens = padded[:, start : start + size]
            logits, cache = self._append(self.weights, tokens, counts, cache, logits, fresh=fresh and start == 0)
        return logits, cache

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Cache,
        *,
        limits: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        eos: Sequence[int] = (),
        logprobs: int | None = None,
        processors: Sequence[Processor] = (),
        samples: int = 1,
        cached: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """Prefills prompts and draws each row's first token.

        Args:
          prompts: token ids of each prompt, at least one; already checked.
          cache: with a row a prompt and room for all; donated.
          limits, params, seeds: one a row, where prompt i has the rows `i * samples` to `(i + 1) * samples - 1`.
          eos: ids that end a row.
          logprobs: None, or how many alternatives a token to keep, 0 and more.
          samples: rows a prompt; it is prefilled once.
          cached: the tokens that are in the cache; None: it is empty.
        """
        logits, cache = self.prefill(prompts, cache, fresh=cached is None)
        if samples > 1:
            logits, cache = _repeat_rows(logits, cache, samples)
        rows = [p for p in prompts for _ in range(samples)]
        controls = Controls.of(params)
        seen = None
        if controls.penalty is not None:
            seen = np.zeros((len(rows), self.spec.vocab), bool)
            for row, prompt in enumerate(rows):
                seen[row, list(prompt)] = True
                if cached is not None:
                    seen[row, list(cached[row // samples])] = True
        ends = np.full(max(4, 1 << (len(eos) - 1).bit_length() if eos else 0), -1, np.int32)
        ends[: len(eos)] = eos
        fixed = dict(logprobs=logprobs, processors=tuple(processors))
        state, written = _first(
            logits,
            cache,
            last=np.asarray([p[-1] for p in rows], np.int32),
            limits=np.asarray(limits, np.int32),
            seeds=np.asarray(seeds, np.uint32),
            eos=ends,
            controls=controls,
            seen=seen,
            **fixed,
        )
        return Batch(self, state, written, ends, controls, fixed)


class Batch:
    """Rows being generated. `written`: what the latest call wrote, as numpy arrays."""

    def __init__(self, runner: Runner, state: loop.State, written: loop.Written, eos, controls, fixed: dict):
        self._runner, self._eos, self._controls, self._fixed = runner, eos, controls, fixed
        self.state: loop.State | None = state
        self.written = jax.device_get(written)

    @property
    def finished(self) -> np.ndarray:
        return self.written.finished

    def advance(self, steps: int, halt: np.ndarray | None = None) -> loop.Written:
        """Up to `steps` more tokens a row, at most `WIDTH`. halt: bool `[B]`, rows to finish first."""
        if halt is None:
            halt = np.zeros(self.finished.shape, bool)
        state, self.state = self.state, None  # donated: lost if a KeyboardInterrupt falls in here
        state, written = self._runner._decode(
            self._runner.weights,
            state,
            np.int32(steps),
            halt,
            self._eos,
            self._controls,
            width=WIDTH,
            **self._fixed,
        )
        self.written = jax.device_get(written)
        self.state = state
        return self.written


_first = jax.jit(loop.first, static_argnames=("logprobs", "processors"), donate_argnames="cache")


@functools.partial(jax.jit, static_argnums=range(8))
def _empty_cache(spec, batch, size, dtype, layout, max_append, window, sinks) -> Cache:
    return init_cache(
        spec, batch, size, dtype=jnp.dtype(dtype), layout=layout, max_append=max_append, window=window, sinks=sinks
    )


@functools.partial(jax.jit, static_argnames="samples")
def _repeat_rows(logits: jax.Array, cache: Cache, samples: int) -> tuple[jax.Array, Cache]:
    rows = jnp.repeat(jnp.arange(logits.shape[0]), samples)
    return logits[rows], cache.take(rows)
