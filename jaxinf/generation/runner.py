"""The host's side of generation: a model's programs, and a batch under way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxinf.cache import Cache, Kind
from jaxinf.generation import buckets, loop
from jaxinf.generation.sampling import Controls, Processor, SamplingParams
from jaxinf.models import CausalLM
from jaxinf.models.causal_lm import init_cache
from jaxinf.models.placing import mesh_of
from sharding import program
from sharding.program import OWN, ROWS, SAME, VOCAB_ROWS
from sharding.rules import RULES

WIDTH = 64
"""Tokens a row that one call of the decode loop may write."""

_NO_WINDOW_LIMIT = 2**30

Prefill = Callable[..., tuple[jax.Array, Cache]]
"""As `Runner.prefill`."""


class Runner:
    """A model split once into weights and structure, and the programs that take the weights as a flat list.

    Flat lists dispatch in a fraction of a millisecond; a module as an argument costs milliseconds a call. A model
    that lies on a mesh (`jaxinf.models.placing.place_model`) runs there: batches are padded to what the mesh
    divides, and caches and states are each chip's own.

    programs: from the name of a program and its jitted function to what is called instead (`jaxinf.aot.export`).
    """

    def __init__(self, model: CausalLM, programs: Callable[[str, Any], Any] = lambda name, program: program):
        self.spec, self.layout, self.dtype = model.spec, model.layout, model.dtype
        self.mesh = mesh_of(model)
        graph, state = nnx.split(model)
        self.weights, tree = jax.tree.flatten(state)

        def merge(weights) -> CausalLM:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))

        self.merge = merge

        @functools.partial(jax.jit, static_argnames="fresh", donate_argnames=("cache", "logits"))
        def append(weights, tokens, counts, cache, logits, *, fresh):
            def run(weights, tokens, counts, cache, logits):
                return loop.append_piece(merge(weights), tokens, counts, cache, logits, fresh=fresh)

            takes = (self.split, ROWS, ROWS, OWN, VOCAB_ROWS)
            return self.over(run, takes, (VOCAB_ROWS, OWN))(weights, tokens, counts, cache, logits)

        static = ("logprobs", "processors")

        @functools.partial(jax.jit, static_argnames=static, donate_argnames="cache")
        def first(logits, cache, rows, controls, eos, *, logprobs, processors):
            def run(logits, cache, rows, controls, eos):
                options: Any = dict(vocab=self.spec.vocab, logprobs=logprobs, processors=processors)
                state, written = loop.first(logits, cache, controls=controls, eos=eos, **rows, **options)
                return state, self.told(written)

            split = {name: VOCAB_ROWS if name == "seen" else ROWS for name in rows}
            state = self.state_split("seen" in rows)
            call = self.over(run, (VOCAB_ROWS, OWN, split, ROWS, SAME), (state, SAME))
            return call(logits, cache, rows, controls, eos)

        @functools.partial(jax.jit, static_argnames=("width", *static), donate_argnames="state")
        def decode(weights, state, steps, halt, eos, controls, *, width, logprobs, processors):
            def run(weights, state, steps, halt, eos, controls):
                options = dict(width=width, logprobs=logprobs, processors=processors)
                given = dict(steps=steps, halt=halt, eos=eos, controls=controls)
                state, written = loop.decode(merge(weights), state, **given, **options)
                return state, self.told(written)

            split = self.state_split(state.seen is not None)
            call = self.over(run, (self.split, split, SAME, ROWS, SAME, ROWS), (split, SAME))
            return call(weights, state, steps, halt, eos, controls)

        self._append, self._first = programs("append", append), programs("first", first)
        self._decode = programs("decode", decode)

    @property
    def model(self) -> CausalLM:
        """The module again; it shares the weights."""
        return self.merge(self.weights)

    @property
    def row_ways(self) -> int:
        """Among how many chips the rows of a batch are divided."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

    @property
    def vocab(self) -> int:
        """Entries of the logits in programs: the vocabulary, and what pads it to divide among chips."""
        ways = 1 if self.mesh is None else self.mesh.shape["tensor"]
        return self.spec.vocab + -self.spec.vocab % ways

    @property
    def split(self) -> list[PartitionSpec]:
        return [w.sharding.spec for w in self.weights] if self.mesh is not None else []

    def state_split(self, seen: bool) -> loop.State:
        rows = ("tokens", "emitted", "limits", "finished", "seeds")
        split: Any = dict(cache=OWN, seen=VOCAB_ROWS if seen else None, vocab=self.spec.vocab)
        return loop.State(**dict.fromkeys(rows, ROWS), **split)

    def over(self, function, takes, gives):
        return function if self.mesh is None else program.over(self.mesh, function, takes, gives)

    def told(self, written):
        """What the host reads: on a mesh, all rows on all chips."""
        return written if self.mesh is None else program.gather_rows(written)

    def put(self, tree, spec: PartitionSpec):
        return tree if self.mesh is None else program.put(self.mesh, tree, spec)

    def bind(self, function, takes: tuple[PartitionSpec, ...] = (ROWS,), gives: Any = ROWS, *, static=()):
        """`jit` of `function(model, *args)` as a function of `args`; the weights travel flat.

        takes, gives: how the mesh, if there is one, splits arguments and results (see `sharding.program.over`). The
          host's arrays are spread accordingly, and their rows must divide (`row_ways`); an argument of `OWN`, the
          last one, is a cache, and donated.
        static: names of static keywords.
        """
        arrays = tuple(spec for spec in takes if spec != OWN)
        kept = takes[len(arrays) :]

        @functools.partial(jax.jit, static_argnames=static, donate_argnames="state")
        def flat(weights, args, state, **options):
            def run(weights, args, state):
                return function(self.merge(weights), *args, *state, **options)

            return self.over(run, (self.split, arrays, kept), gives)(weights, args, state)

        def call(*args, **options):
            given = tuple(self.put(x, spec) for x, spec in zip(args, arrays, strict=False))
            return flat(self.weights, given, args[len(arrays) :], **options)

        return call

    def new_cache(
        self,
        batch: int,
        tokens: int,
        *,
        limit: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        max_append: int = 1,
        kind: Kind | None = None,
    ) -> Cache:
        """An empty cache with room for `tokens` a row, rounded up to a bucket below `limit`.

        With a `window`, memory is bounded whatever `tokens` is. A mesh's is that of the padded batch. kind: as for
        `CausalLM.init_cache`.
        """
        size = _NO_WINDOW_LIMIT if window is not None else buckets.capacity(tokens, limit)
        rows = -(-batch // self.row_ways)
        made = (self.spec, rows, size, jnp.dtype(self.dtype).name, self.layout, max_append, window, sinks, kind)
        return _empty_cache(self.mesh, *made)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Cache, *, fresh: bool) -> tuple[jax.Array, Cache]:
        """Appends prompts piece by piece: `(logits float32 [B, V], cache)`. The cache is donated.

        On a mesh, B and V are what it pads them to.
        """
        logits = self.no_logits(len(prompts))
        for tokens, counts, first in self.pieces(prompts, fresh=fresh):
            logits, cache = self._append(self.weights, tokens, counts, cache, logits, fresh=fresh and first)
        return logits, cache

    def no_logits(self, rows: int) -> jax.Array:
        """Zeros `[B, V]` for what the first piece of the prompts of so many rows replaces."""
        return _nothing(self.mesh, rows + -rows % self.row_ways, self.vocab)

    def pieces(self, prompts: Sequence[Sequence[int]], *, fresh: bool) -> Iterator[tuple[Any, Any, bool]]:
        """`(tokens int32 [B, T], counts int32 [B], is it the first)` of each pass over prompts, on the device."""
        prompts = [*prompts, *[[0]] * (-len(prompts) % self.row_ways)]
        lengths = np.asarray([len(p) for p in prompts], np.int32)
        split = self.mesh is not None and self.mesh.shape["sequence"] > 1 and fresh
        parts = buckets.pieces(int(lengths.max()), whole=self.spec.reads_prompts_whole or split)
        padded = np.zeros((len(prompts), parts[-1][0] + parts[-1][1]), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        for start, size in parts:
            counts = np.clip(lengths - start, 0, size)
            tokens, counts = self.put((padded[:, start : start + size], counts), ROWS)
            yield tokens, counts, start == 0

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
        prefill: Prefill | None = None,
    ) -> Batch:
        """Prefills prompts and draws each row's first token.

        Args:
          prompts: token ids of each prompt, at least one; already checked.
          cache: with a row a prompt (a row a sample on a mesh) and room for all; donated.
          limits, params, seeds: one a row, where prompt i has the rows `i * samples` to `(i + 1) * samples - 1`.
          eos: ids that end a row.
          logprobs: None, or how many alternatives a token to keep, 0 and more.
          samples: rows a prompt; it is prefilled once.
          cached: the tokens that are in the cache; None: it is empty.
          prefill: called instead of `prefill`, with prompts that it may not repeat rows of.
        """
        if samples > 1 and (self.mesh is not None or prefill is not None):
            # Rows of a mesh's caches are not where a copy of them would have to be.
            prompts = [p for p in prompts for _ in range(samples)]
            cached = None if cached is None else [p for p in cached for _ in range(samples)]
            samples = 1
        logits, cache = (prefill or self.prefill)(prompts, cache, fresh=cached is None)
        if samples > 1:
            logits, cache = _repeat_rows(logits, cache, samples)
        rows = [p for p in prompts for _ in range(samples)]
        spare = -len(rows) % self.row_ways  # rows that end with their first token
        params, seeds, limits = [*params, *[params[0]] * spare], [*seeds, *[0] * spare], [*limits, *[1] * spare]
        last = [*(p[-1] for p in rows), *[0] * spare]
        controls = Controls.of(params)
        given: dict[str, Any] = dict(
            last=np.asarray(last, np.int32), limits=np.asarray(limits, np.int32), seeds=np.asarray(seeds, np.uint32)
        )
        given = self.put(given, ROWS)
        if controls.penalty is not None:
            seen = np.zeros((len(last), self.vocab), bool)
            for row, prompt in enumerate(rows):
                seen[row, list(prompt)] = True
                if cached is not None:
                    seen[row, list(cached[row // samples])] = True
            given["seen"] = self.put(seen, VOCAB_ROWS)
        ends = np.full(max(4, 1 << (len(eos) - 1).bit_length() if eos else 0), -1, np.int32)
        ends[: len(eos)] = eos
        ends, controls = self.put(ends, SAME), self.put(controls, ROWS)
        fixed = dict(logprobs=logprobs, processors=tuple(processors))
        state, written = self._first(logits, cache, given, controls, ends, **fixed)
        return Batch(self, state, written, ends, controls, fixed, rows=len(rows))


class Batch:
    """Rows being generated. `written`: what the latest call wrote, as numpy arrays, without rows that only pad."""

    tally = None
    """What drafting came to: there is none (`jaxinf.generation.speculative.SpeculativeBatch`)."""

    def __init__(
        self, runner: Runner, state: loop.State, written: loop.Written, eos, controls, fixed: dict, *, rows: int
    ):
        self._runner, self.eos, self.controls, self.fixed, self._rows = runner, eos, controls, fixed, rows
        self.state: loop.State | None = state
        self.written = self._read(written)

    def _read(self, written: loop.Written) -> loop.Written:
        return jax.tree.map(lambda x: x[: self._rows], jax.device_get(written))

    @property
    def finished(self) -> np.ndarray:
        return np.asarray(self.written.finished)

    def advance(self, steps: int, halt: np.ndarray | None = None) -> loop.Written:
        """Up to `steps` more tokens a row, at most `WIDTH`. halt: bool `[B]`, rows to finish first."""
        if halt is None:
            halt = np.zeros(self.finished.shape, bool)
        halt = np.pad(halt, (0, -len(halt) % self._runner.row_ways))
        state, self.state = self.state, None  # donated: lost if a KeyboardInterrupt falls in here
        state, written = self._runner._decode(
            self._runner.weights,
            state,
            self._runner.put(np.int32(steps), SAME),
            self._runner.put(halt, ROWS),
            self.eos,
            self.controls,
            width=WIDTH,
            **self.fixed,
        )
        self.written = self._read(written)
        self.state = state
        return self.written


@functools.partial(jax.jit, static_argnums=range(10))
def _empty_cache(mesh, spec, batch, size, dtype, layout, max_append, window, sinks, kind) -> Cache:
    def make() -> Cache:
        options: Any = dict(max_append=max_append, window=window, sinks=sinks, kind=kind)
        return init_cache(spec, batch, size, dtype=jnp.dtype(dtype), layout=layout, **options)

    return make() if mesh is None else program.over(mesh, make, (), OWN)()


def _nothing(mesh, rows: int, vocab: int) -> jax.Array:
    if mesh is None:
        return jnp.zeros((rows, vocab), jnp.float32)
    return jnp.zeros((rows, vocab), jnp.float32, device=NamedSharding(mesh, VOCAB_ROWS))


@functools.partial(jax.jit, static_argnames="samples")
def _repeat_rows(logits: jax.Array, cache: Cache, samples: int) -> tuple[jax.Array, Cache]:
    rows = jnp.repeat(jnp.arange(logits.shape[0]), samples)
    return logits[rows], cache.take(rows)
