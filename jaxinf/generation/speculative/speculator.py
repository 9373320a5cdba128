"""The host's side of speculation: a drafter's programs, and a batch under way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinf.cache import Cache
from jaxinf.generation import buckets
from jaxinf.generation.loop import State, Written
from jaxinf.generation.runner import WIDTH, Batch, Runner
from jaxinf.generation.speculative import loop, speculation
from jaxinf.generation.speculative.drafter import Drafter, check_nodes
from jaxinf.generation.speculative.policy import Costs, Policy
from jaxinf.generation.speculative.speculation import Speculation, Tally
from jaxinf.layers import ExpertChoice, MoESpec
from pallas_kernels.errors import InputError, UnsupportedError
from sharding.program import OWN, ROWS, SAME, VOCAB_ROWS


class Speculator:
    """Generation by a `Runner` with a drafter beside.

    Args:
      runner: of the target. drafter: on the target's mesh, if it has one.
      costs: see `jaxinf.generation.speculative.decode`; None: drafts are always made in full.

    Raises:
      InputError: the drafter does not fit the target.
      UnsupportedError: trees where keys cannot be moved, or ropes whose angles depend on how long a row is.
    """

    def __init__(self, runner: Runner, drafter: Drafter, costs: Costs | None = None):
        check_nodes("the number of drafted tokens", drafter.nodes)
        drafter.check(runner.model)
        if runner.spec.reads_prompts_whole:
            raise UnsupportedError(
                "the angles of this model's rope depend on the length of a row, which drafted tokens would change: "
                "decode without a drafter"
            )
        mesh = runner.mesh
        if mesh is not None:
            for axis in ("sequence", "pipeline"):
                if mesh.shape[axis] > 1 and not drafter.chain:
                    raise UnsupportedError(
                        f"trees of drafted tokens move keys within the cache, which {axis}={mesh.shape[axis]} "
                        "spreads over chips: take a drafter of chains"
                    )
            if mesh.shape["sequence"] > 1 and drafter.reads_hidden:
                raise UnsupportedError(
                    f"this drafter reads the hidden states of prompts, which sequence={mesh.shape['sequence']} "
                    "spreads over chips: take another, or sequence=1"
                )
        self.runner, self.drafter, self.costs = runner, drafter, costs
        leaves, tree = jax.tree.flatten(drafter)
        self._weights = [_placed(runner, x) for x in leaves]
        split = [_spec(x) for x in self._weights] if mesh is not None else []

        def both(weights) -> tuple[Any, Drafter]:
            return runner.merge(weights[0]), jax.tree.unflatten(tree, weights[1])

        owned = [runner.split, split]

        @functools.partial(jax.jit, static_argnames="room", donate_argnames=("cache", "logits", "held"))
        def read(weights, tokens, counts, cache, logits, held, *, room: int):
            """held: the drafter's state and the history, for `room` tokens a row; (): of the first piece."""

            def run(weights, tokens, counts, cache, logits, held):
                target, helper = both(weights)
                rows = tokens.shape[0]
                state, history = held or (helper.init(target, rows, room), jnp.zeros((rows, room), jnp.int32))
                given = (tokens, counts, cache, logits, state, history)
                logits, cache, state, history = loop.read_piece(target, helper, *given, fresh=not held)
                return logits, cache, (state, history)

            kept = (OWN, ROWS)
            takes = (owned, ROWS, ROWS, OWN, VOCAB_ROWS, kept if held else ())
            call = runner.over(run, takes, (VOCAB_ROWS, OWN, kept))
            return call(weights, tokens, counts, cache, logits, held)

        @functools.partial(jax.jit, donate_argnames=("rows", "state", "history"))
        def begin(rows, state, history):
            def run(rows, state, history):
                return speculation.begin(rows, drafter, state, history)

            seen = rows.seen is not None
            takes = (runner.state_split(seen), OWN, ROWS)
            return runner.over(run, takes, self._state_split(seen))(rows, state, history)

        static = ("width", "logprobs", "processors")

        @functools.partial(jax.jit, static_argnames=static, donate_argnames="state")
        def decode(weights, state, steps, halt, eos, controls, costs, *, width, logprobs, processors):
            def run(weights, state, steps, halt, eos, controls, costs):
                target, helper = both(weights)
                given = dict(steps=steps, halt=halt, eos=eos, controls=controls, costs=costs)
                options = dict(width=width, logprobs=logprobs, processors=processors)
                state, written = loop.decode(target, helper, state, **given, **options)
                return state, runner.told((written, state.tally))

            split = self._state_split(state.rows.seen is not None)
            takes = (owned, split, SAME, ROWS, SAME, ROWS, SAME)
            call = runner.over(run, takes, (split, SAME))
            return call(weights, state, steps, halt, eos, controls, costs)

        self._read, self._start, self._decode = read, begin, decode

    def with_costs(self, costs: Costs | None) -> Speculator:
        """The same programs with other costs."""
        other = copy.copy(self)
        other.costs = costs
        return other

    @property
    def max_append(self) -> int:
        """What the target's cache must be made with."""
        return self.drafter.nodes + 1

    @property
    def spare(self) -> int:
        """Tokens that the target's cache must have room for besides those of prompts and answers."""
        return 0 if self.drafter.chain else self.drafter.nodes

    def begin(self, prompts: Sequence[Sequence[int]], cache: Cache, **options: Any) -> SpeculativeBatch:
        """As `Runner.begin`, without tokens that are in the cache already; the cache has a row for each sample.

        Raises:
          InputError: the cache is not empty, or not made for these rows and drafts.
          UnsupportedError: several rows of a model whose experts choose among the rows of a step.
        """
        if options.pop("cached", None) is not None:
            raise InputError("a drafter reads prompts from their start: give an empty cache")
        limits = options["limits"]
        samples = options.get("samples", 1)
        rows = [p for p in prompts for _ in range(samples)]
        longest = max(len(p) + n for p, n in zip(rows, limits, strict=True))
        self._check(cache, len(rows), longest)
        room = buckets.capacity(longest + 1, None)
        held: tuple[Any, ...] = ()

        def prefill(prompts, cache, *, fresh):
            nonlocal held
            runner = self.runner
            weights = [runner.weights, self._weights]
            logits = runner.no_logits(len(prompts))
            for piece, counts, _ in runner.pieces(prompts, fresh=fresh):
                logits, cache, held = self._read(weights, piece, counts, cache, logits, held, room=room)
            return logits, cache

        plain = self.runner.begin(prompts, cache, prefill=prefill, **options)
        state = self._start(plain.state, *held)
        return SpeculativeBatch(self, plain, state)

    def _check(self, cache: Cache, rows: int, longest: int) -> None:
        """longest: prompt and answer of a row."""
        ffns = [layer.ffn for layer in self.runner.spec.layers()]
        if rows > 1 and any(isinstance(f, MoESpec) and isinstance(f.router, ExpertChoice) for f in ffns):
            raise UnsupportedError(
                f"this model's experts choose among the rows of a step, and {rows} rows of drafted tokens would be "
                "other steps: give one row, or decode without a drafter"
            )
        if self.runner.mesh is not None:  # whose caches are each chip's own
            return
        if cache.batch != rows:
            raise InputError(f"the cache has {cache.batch} rows, but there are {rows} answers: make it with {rows}")
        needed = longest - 1 + self.spare
        if cache.capacity is not None and cache.capacity < needed:
            raise InputError(
                f"the cache holds {cache.capacity} tokens a row, but prompts, answers and {self.spare} tokens of "
                f"trees take {needed}: make it for {needed}"
            )
        if cache.append_limit is not None and cache.append_limit < self.drafter.nodes:
            raise InputError(
                f"of the cache {cache.append_limit} tokens can be taken back, but a draft has "
                f"{self.drafter.nodes}: make it with max_append={self.max_append}"
            )

    def advance(self, state: Speculation, steps: int, halt, eos, controls, fixed, costs: Costs | None):
        runner = self.runner
        costs = None if costs is None else runner.put(jax.tree.map(np.float32, costs), SAME)
        given = (runner.put(np.int32(steps), SAME), runner.put(halt, ROWS), eos, controls, costs)
        return self._decode([runner.weights, self._weights], state, *given, width=WIDTH, **fixed)

    def _state_split(self, seen: bool) -> Any:
        rows: Any = ROWS
        same: Any = SAME
        drafter = self.drafter
        policy = Policy(rows, rows, rows, same, same, drafter.depth, drafter.chain, drafter.steps)
        return Speculation(self.runner.state_split(seen), OWN, rows, policy, Tally(rows, rows, rows, rows))


class SpeculativeBatch:
    """Rows being generated; as `Batch`."""

    def __init__(self, speculator: Speculator, plain: Batch, state: Speculation):
        self._speculator, self._plain = speculator, plain
        self._state: Speculation | None = state
        self.costs = speculator.costs
        self.written: Written = plain.written
        rows = len(plain.finished)
        self._tally: Tally = jax.tree.map(
            lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), jax.eval_shape(lambda: state.tally)
        )

    @property
    def separable(self) -> bool:
        """Whether the costs tell drafting from verifying: what a draft takes whatever its length is counted with
        the verification."""
        drafter = self._speculator.drafter
        return drafter.free or drafter.steps

    @property
    def tally(self) -> Tally:
        """What drafting came to so far, as numpy arrays; read from the device when asked for."""
        rows = len(self.finished)
        return jax.tree.map(lambda x: x[:rows], jax.device_get(self._tally))

    @property
    def state(self) -> State | None:
        return None if self._state is None else self._state.rows

    @property
    def finished(self) -> np.ndarray:
        return np.asarray(self.written.finished)

    def advance(self, steps: int, halt: np.ndarray | None = None) -> Written:
        """Up to `steps` passes, at most `WIDTH`, which give as many tokens a row or more, unless rows end or
        `WIDTH` tokens are there. halt: bool `[B]`, rows to finish first."""
        if halt is None:
            halt = np.zeros(self.finished.shape, bool)
        rows, plain = len(self.finished), self._plain
        halt = np.pad(halt, (0, -rows % self._speculator.runner.row_ways))
        state, self._state = self._state, None  # donated: lost if a KeyboardInterrupt falls in here
        assert state is not None
        given = (steps, halt, plain.eos, plain.controls, plain.fixed, self.costs)
        state, (written, self._tally) = self._speculator.advance(state, *given)
        self.written = jax.tree.map(lambda x: x[:rows], jax.device_get(written))
        self._state = state
        return self.written


def _spec(x: jax.Array) -> PartitionSpec:
    assert isinstance(x.sharding, NamedSharding)
    return x.sharding.spec


def _placed(runner: Runner, x: jax.Array) -> jax.Array:
    mesh = runner.mesh
    if mesh is None or (isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh):
        return x
    return runner.put(x, PartitionSpec())
