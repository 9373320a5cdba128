"""Distributions over continuations: enumerated from the model's logits, and counted from what drafting wrote."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaincc
from tiny_models import model, whole

from jaxinf.generation import SamplingParams, process
from jaxinf.generation.loop import State
from jaxinf.generation.sampling import Controls
from jaxinf.generation.speculative import Drafter, begin, decode, read_piece
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, fold

LENGTH = 3
"""Tokens of a continuation."""
DEPTH = LENGTH - 1
"""Of drafts: so that what follows a whole accepted draft is within the continuation."""
PROMPT = (3, 7, 1, 7)
SAMPLES = 200_000
LEVEL = 0.001
"""How often all proofs together may fail by chance."""

SETTINGS = {
    "temperature": SamplingParams(temperature=1.3),
    "top-k": SamplingParams(temperature=0.9, top_k=5),
    "top-p": SamplingParams(temperature=1.1, top_p=0.8),
    "min-p": SamplingParams(temperature=1.5, min_p=0.15),
}


def controls_of(settings: Sequence[SamplingParams], rows: int) -> Controls:
    """`rows` rows of each; what any of them asks for has an array, so that one program serves all of them."""
    neutral = dict(temperature=1.0, top_k=2**31 - 1, top_p=1.0, min_p=0.0)

    def column(name, value):
        given = [getattr(s, name) for s in settings]
        if all(x is None for x in given):
            return None
        dtype = np.int32 if name == "top_k" else np.float32
        return jnp.repeat(jnp.asarray([value if x is None else x for x in given], dtype), rows)

    return Controls(**{name: column(name, value) for name, value in neutral.items()})


def small(layers: int = 1) -> CausalLM:
    """A target of twelve tokens whose every next token depends on all before."""
    layer = LayerSpec(AttentionSpec(2, 1, 8, rope=RopeSpec(8)), FFNSpec(16))
    return model(ModelSpec(12, 16, fold([layer] * layers), 64), gain=1.6)


def exact(target: CausalLM, settings: Sequence[SamplingParams]) -> tuple[np.ndarray, np.ndarray]:
    """`(probabilities float64 [len(settings), V^LENGTH] of continuations of PROMPT, log-probabilities of each token
    after each beginning, before the settings, float32 [1 + V + V^2, V])`, beginnings ordered by length, then as
    numbers to the base V."""
    vocab = target.spec.vocab
    begins = [end for length in range(LENGTH) for end in itertools.product(range(vocab), repeat=length)]
    tokens = np.zeros((len(begins), len(PROMPT) + LENGTH - 1), np.int32)
    for row, end in enumerate(begins):
        tokens[row, : len(PROMPT) + len(end)] = [*PROMPT, *end]
    last = np.asarray([len(PROMPT) + len(end) - 1 for end in begins])
    logits = whole(target, tokens)[np.arange(len(begins)), last]
    # Their processors and penalty apart, settings do not look at the context.
    made = jax.jit(process)(jnp.tile(logits, (len(settings), 1)), controls_of(settings, len(begins)))
    made = np.asarray(made, np.float64).reshape(len(settings), len(begins), vocab)
    weights = np.exp(made - made.max(axis=2, keepdims=True))
    steps = weights / weights.sum(axis=2, keepdims=True)
    laws = np.ones((len(settings), 1))
    for length in range(LENGTH):
        first = (vocab**length - 1) // (vocab - 1)
        laws = (laws[:, :, None] * steps[:, first : first + vocab**length]).reshape(len(settings), -1)
    return laws, np.asarray(jax.nn.log_softmax(logits))


class Counter:
    """`counted` as a program of its own: what is planted in the sources while it compiles is in it alone."""

    def __init__(self, target: CausalLM, settings: Sequence[SamplingParams]):
        self.target, self.settings = target, settings
        self.laws, self.scores = exact(target, settings)

        def fresh(*args, **options):
            return counted(*args, **options)

        self._program = jax.jit(fresh, static_argnames=("settings", "rows"))
        self._compiled: dict[str, Any] = {}

    def __call__(self, name: str, drafter: Drafter, seed: int, samples: int, rows: int = 512):
        """`(counts int64 [settings, V^LENGTH], largest difference of log-probabilities, (accepted, offered))` of
        `samples` of each setting; name: of what is compiled but once."""
        controls = controls_of(self.settings, rows)
        args = self.target, drafter, controls, self.scores, np.uint32(seed)
        batches = np.int32(-(-samples // rows))
        if name not in self._compiled:
            lowered = self._program.lower(*args, batches, settings=len(self.settings), rows=rows)
            # Here it is running, not compiling, that takes the time.
            options = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
            self._compiled[name] = lowered.compile(compiler_options=options)
        found, worst, tally = jax.device_get(self._compiled[name](*args, batches))
        assert found.sum(axis=1).tolist() == [batches * rows] * len(self.settings)
        return found.astype(np.int64), float(worst), tuple(tally.tolist())


def counted(
    target: CausalLM,
    drafter: Drafter,
    controls: Controls,
    scores: jax.Array,
    seed: jax.Array,
    batches: jax.Array,
    *,
    settings: int,
    rows: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continuations of PROMPT with seeds from `seed` on, `batches` times `rows` of each setting.

    Returns:
      `(int32 [settings, V^LENGTH], how often each came; the largest difference of an emitted log-probability from
      scores; accepted and offered drafts)`.
    """
    vocab, batch, prompt = target.spec.vocab, settings * rows, len(PROMPT)
    slots = prompt + LENGTH + 2 * (drafter.nodes + 1)
    counts = jnp.full((batch,), prompt - 1, jnp.int32)
    told = jnp.broadcast_to(jnp.asarray(PROMPT, jnp.int32), (batch, prompt))
    # All but the last token: the loop draws every token of the continuation.
    _, cache, state, history = read_piece(
        target,
        drafter,
        told[:, :-1],
        counts,
        target.init_cache(batch, slots, max_append=drafter.nodes + 1),
        jnp.zeros((batch, vocab), jnp.float32),
        drafter.init(target, batch, slots),
        jnp.zeros((batch, slots), jnp.int32),
        fresh=True,
    )
    none, which = jnp.zeros((batch,), jnp.int32), jnp.repeat(jnp.arange(settings), rows)
    eos = jnp.full((1,), -1, jnp.int32)

    def one(i, carry):
        found, worst, stood = carry
        seeds = seed + i * batch + jnp.arange(batch, dtype=jnp.uint32)
        limits = jnp.full((batch,), LENGTH + drafter.depth + 1)  # far enough for whole drafts
        start = State(cache, told[:, -1], none, limits, none > 0, seeds, None, vocab)
        start = begin(start, drafter, state, history)
        after, written = decode(
            target,
            drafter,
            start,
            steps=jnp.int32(LENGTH),  # each pass writes a token at least
            eos=eos,
            controls=controls,
            width=LENGTH * (drafter.depth + 1),
            logprobs=0,
        )
        tokens = written.tokens[:, :LENGTH]
        place = jnp.zeros((batch,), jnp.int32)
        for t in range(LENGTH):
            begins = (vocab**t - 1) // (vocab - 1)
            gap = jnp.abs(written.logprobs[:, t] - scores[begins + place, tokens[:, t]])
            worst = jnp.maximum(worst, jnp.max(gap))
            place = place * vocab + tokens[:, t]
        found = found.at[which, place].add((written.counts >= LENGTH).astype(jnp.int32))
        tally = jnp.stack([jnp.sum(after.tally.accepted), jnp.sum(after.tally.offered)])
        return found, worst, stood + tally

    zeros = jnp.zeros((settings, vocab**LENGTH), jnp.int32), jnp.float32(0), jnp.zeros((2,), jnp.int32)
    return jax.lax.fori_loop(0, batches, one, zeros)


def chi_square(found: np.ndarray, law: np.ndarray, *, least: float = 5.0) -> float:
    """The probability of counts as far from a law as these: Pearson's test, cells that expect fewer than `least`
    counted together. 0 if anything came that cannot."""
    if found[law == 0].any():
        return 0.0
    expected = law * found.sum()
    small = expected < least
    pairs = [*zip(found[~small], expected[~small], strict=True)]
    if expected[small].sum() > 0:
        pairs.append((found[small].sum(), expected[small].sum()))
    got, want = np.asarray(pairs, np.float64).T
    statistic = np.sum((got - want) ** 2 / want)
    return float(gammaincc((len(want) - 1) / 2, statistic / 2))


def seeds_of(name: str, count: int = 5) -> list[int]:
    """Seeds that follow from a test's name, so that nobody chose them."""
    return [int.from_bytes(hashlib.sha256(f"{name} {i}".encode()).digest()[:4], "little") for i in range(count)]
