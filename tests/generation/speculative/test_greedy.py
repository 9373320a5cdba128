"""What plain decoding writes, a drafter writes sooner: token for token, whatever the model, cache and request."""

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from generation.speculative.drafters import CHAIN, DRAFTERS, fits, table_tree
from generation.speculative.runs import Task, hosted, rows_of
from tiny_models import model

from jaxinf.generation import Runner, SamplingParams
from jaxinf.generation.speculative import Drafter
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import ModelSpec, fold

VOCAB = 16
PROMPTS = [[1, 2, 3], list(range(1, 15)), [5] * 12, [9], [10, 11, 12, 10, 11, 12, 10]]
LIMITS = [24, 9, 1, 24, 2]

SINKS: dict[str, Any] = dict(window=7, sinks=2)


@cache
def target(name: str):
    rope = RopeSpec(8)
    ffn = MoESpec(4, 8, TokenChoice(top_k=2), shared=FFNSpec(16)) if name == "mixture" else FFNSpec(32)
    whole = LayerSpec(AttentionSpec(4, 2, 8, rope=rope), ffn)
    window = LayerSpec(AttentionSpec(4, 2, 8, rope=rope, window=6), ffn)  # which the rows outgrow
    layers = {"window": [window], "both": [window, whole]}.get(name, [whole])
    return model(ModelSpec(VOCAB, 32, fold(layers), 512), gain=1.3)


SETUPS: dict[str, tuple[str, dict]] = {
    "dense": ("dense", {}),
    "window": ("window", {}),
    "mixture": ("mixture", {}),
    "sinks": ("dense", SINKS),
    "int8": ("dense", dict(kind="int8")),
    "window, int8": ("window", dict(kind="int8")),
    "windows and whole": ("both", {}),
    "int4": ("dense", dict(kind="int4")),
}
CHAINS = ("draft model", "prompt lookup", "layers left out", "look-ahead tokens", "eagle", "drawn chain")
QUICK = {("window", "draft model"), ("window, int8", "given tree")}
CASES = [
    pytest.param(setup, name, marks=() if (setup, name) in QUICK else pytest.mark.slow)
    for setup, name in itertools.product(SETUPS, DRAFTERS)
    if name in CHAINS or setup not in ("sinks", "int4")  # which refuse trees
    if fits(name, target(SETUPS[setup][0]))
]


@cache
def task(setup: str) -> Task:
    name, options = SETUPS[setup]
    return Task(target(name), PROMPTS, LIMITS, logprobs=2 if setup == "window" else None, cache=options)


def same_as_plain(here: Task, drafter: Drafter, **options):
    one, state, written = here.drafted(drafter, **options)
    plain, parts = here.plain, (one, written)
    assert rows_of(*parts) == rows_of(plain)
    assert written.finished.all()
    lengths = here.counts + plain.counts - 1
    assert state.rows.cache.lengths.tolist() == lengths.tolist()
    assert state.rows.emitted.tolist() == plain.counts.tolist()
    for row, prompt in enumerate(here.prompts):
        known = [*prompt, *rows_of(plain)[row]]
        assert state.history[row, : len(known)].tolist() == known
    if here.logprobs is not None:
        for name in ("logprobs", "top_logprobs"):
            for got, want in zip(rows_of(*parts, name=name), rows_of(plain, name=name), strict=True):
                np.testing.assert_allclose(got, want, atol=1e-4)
        assert rows_of(*parts, name="top_ids") == rows_of(plain, name="top_ids")
    return one, state, written


@pytest.mark.parametrize(("setup", "name"), CASES)
def test_greedy_tokens_are_plain_ones(setup: str, name: str) -> None:
    """Ragged prompts, limits inside of runs, log-probabilities, memory that nobody wrote."""
    here = task(setup)
    tally = same_as_plain(here, DRAFTERS[name](here.target, 3))[1].tally
    assert 0 < tally.accepted.sum() < tally.offered.sum()
    assert (tally.passes <= here.plain.counts - 1).all()
    assert tally.passes.sum() < (here.plain.counts - 1).sum()


def test_ends_inside_of_accepted_runs() -> None:
    """Whichever of its tokens ends a row; then neither cache nor history has more of it."""
    free = task("window")
    drafter = DRAFTERS["draft model"](free.target, 3)
    row = rows_of(free.plain)[0]
    inside = 0
    for end in sorted({*row}):
        here = Task(free.target, PROMPTS, LIMITS, logprobs=2, eos=[end])
        _, state, _ = same_as_plain(here, drafter)
        stood = state.tally.passes + state.tally.accepted.sum(axis=1)
        inside += int((stood > here.plain.counts - 1).any())
    assert inside > 1


def test_halted_rows_write_nothing() -> None:
    here = task("window")
    halt = np.asarray([True, False, False, False, True])
    one, state, written = here.drafted(DRAFTERS["draft model"](here.target, 3), halt=halt)
    assert written.counts[halt].tolist() == [0, 0]
    assert written.finished.all()
    assert state.rows.cache.lengths[halt].tolist() == here.counts[halt].tolist()
    plain = rows_of(here.plain)
    assert [r for r, h in zip(rows_of(one, written), halt, strict=True) if not h] == plain[1:4]


def test_memory_that_nobody_wrote_is_never_read() -> None:
    """A pass over a tree sees nothing but what it wrote and what was there: not even a nan."""
    here = task("window, int8")
    same_as_plain(here, DRAFTERS["given tree"](here.target, 3), poison=np.nan)


SAMPLED = [
    SamplingParams(temperature=0.9, top_k=9),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(),
    SamplingParams(temperature=1.1, min_p=0.1),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9),
]
DRAWN = ("draft model", "draft tree", "layers left out", "eagle", "drawn tree", "drawn chain")
GIVEN = [name for name in DRAFTERS if name not in DRAWN]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "prompt lookup" else pytest.mark.slow) for n in GIVEN]
)
def test_sampled_tokens_are_plain_ones_where_candidates_are_given(name: str) -> None:
    """The same seeds give the same tokens: the target draws them, whoever guessed them."""
    here = Task(
        target("both" if name == "layers left out" else "mixture"),
        PROMPTS,
        LIMITS,
        SAMPLED,
        seeds=[7, 7, 8, 9, 2**32 - 1],
    )
    drafter = DRAFTERS[name](here.target, 3)
    assert not drafter.draws
    tally = same_as_plain(here, drafter)[1].tally
    assert tally.accepted.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_cold_rows_among_sampled_ones(name: str) -> None:
    here = Task(target("both"), PROMPTS, LIMITS, SAMPLED[2:] + SAMPLED[:2])
    one, _, written = here.drafted(DRAFTERS[name](here.target, 3))
    assert rows_of(one, written)[0] == rows_of(here.plain)[0]
    assert [len(row) for row in rows_of(one, written)] == LIMITS


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_penalties_see_the_path(name: str) -> None:
    """Each drafted token is judged with those before it on its branch counted among the seen."""
    params = [SamplingParams(repetition_penalty=p) for p in (1.3, 0.7, 2.0, 4.0, 1.0)]
    here = Task(target("both"), PROMPTS, LIMITS, params)
    bare = Task(here.target, PROMPTS, LIMITS)
    assert rows_of(here.plain) != rows_of(bare.plain)
    _, state, _ = same_as_plain(here, DRAFTERS[name](here.target, 3))
    for row, (prompt, made) in enumerate(zip(PROMPTS, rows_of(here.plain), strict=True)):
        assert np.flatnonzero(state.rows.seen[row]).tolist() == sorted({*prompt, *made})


def test_the_host_takes_passes_in_calls_of_any_size() -> None:
    """One program for all of them; each row as in plain decoding."""
    runner = Runner(target("dense"))
    drafter = table_tree(runner.model, 0, CHAIN)
    limits = [20, 9, 1, 30, 2]
    here = Task(runner.model, PROMPTS, [min(n, 24) for n in limits])
    found = {steps: hosted(runner, drafter, PROMPTS, limits, steps=steps)[0] for steps in (3, 64)}
    assert found[3] == found[64]
    assert [len(row) for row in found[3]] == limits
    assert [row[:24] for row in found[3]] == rows_of(here.plain)
