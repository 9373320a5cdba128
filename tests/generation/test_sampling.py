"""The distribution that tokens are drawn from, against an independent formulation in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.generation import Context, Controls, SamplingParams, process, row_keys, sample
from pallas_kernels.errors import InputError

VOCAB = 50


def logits(rows: int = 3, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32) * 3


def expected(row: np.ndarray, p: SamplingParams, seen: np.ndarray) -> np.ndarray:
    """The processed distribution of one row, by sorting."""
    x = row.astype(np.float64)
    if p.repetition_penalty is not None:
        x[seen] = np.where(x[seen] < 0, x[seen] * p.repetition_penalty, x[seen] / p.repetition_penalty)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    if p.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x = x / p.temperature
    order = np.argsort(-x, kind="stable")
    if p.top_k is not None:
        x[order[p.top_k :]] = -np.inf
    if p.top_p is not None:
        probabilities = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        before = np.cumsum(probabilities[order]) - probabilities[order]
        x[order[before >= p.top_p]] = -np.inf
    probabilities = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if p.min_p is not None:
        probabilities[probabilities < p.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


SEEN = np.random.default_rng(1).random((3, VOCAB)) < 0.3
CONTEXT = Context(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), jnp.asarray(SEEN))


@jax.jit
def distribution(x: jax.Array, controls: Controls) -> jax.Array:
    return jax.nn.softmax(process(x, controls, context=CONTEXT), axis=-1)


CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(temperature=1.0, top_k=7),
    "top_k of one": SamplingParams(temperature=2.0, top_k=1),
    "top_k beyond the vocabulary": SamplingParams(temperature=1.0, top_k=1000),
    "top_p": SamplingParams(temperature=1.3, top_p=0.8),
    "top_p of almost nothing": SamplingParams(temperature=1.3, top_p=1e-6),
    "min_p": SamplingParams(temperature=2.0, min_p=0.1),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.7),
    "greedy with penalty and bias": SamplingParams(repetition_penalty=1.7, logit_bias={3: 2.5, 4: -math.inf}),
    "bias": SamplingParams(temperature=1.0, logit_bias={0: 5.0, 49: -3.0, 7: 1.0}),
    "all": SamplingParams(1.4, 20, 0.9, 0.02, 1.3, {2: 4.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_process_follows_the_definition(name: str) -> None:
    params, x = CASES[name], logits()
    got = distribution(x, Controls.of([params] * 3))
    for row in range(3):
        want = expected(x[row], params, SEEN[row])
        np.testing.assert_allclose(got[row], want, atol=2e-6)
        assert np.array_equal(np.asarray(got[row]) > 0, want > 0)


def test_rows_keep_their_own_parameters() -> None:
    rows = [CASES["greedy with penalty and bias"], CASES["all"], CASES["top_p"]]
    x = logits()
    got = distribution(x, Controls.of(rows))
    for row, params in enumerate(rows):
        np.testing.assert_allclose(got[row], expected(x[row], params, SEEN[row]), atol=2e-6)


def test_tokens_that_tie_with_the_last_one_stay() -> None:
    x = jnp.asarray([[3.0, 2.0, 2.0, 2.0, 1.0, -1.0]])
    got = process(x, Controls.of([SamplingParams(temperature=1.0, top_k=2)]))
    assert np.isfinite(got[0]).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-42, 1e-300])
def test_the_coldest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    x = jnp.asarray(40 * logits())
    controls = Controls.of([SamplingParams(temperature=temperature, top_p=0.9)] * 3)
    keys = row_keys(jnp.arange(3), jnp.zeros(3))
    np.testing.assert_array_equal(jnp.argmax(x, axis=-1), sample(x, controls, keys))


def test_processors_come_before_temperature() -> None:
    def shift(x, context):
        return x.at[:, 1].add(jnp.where(context.emitted == 2, 10.0, 0.0))

    context = Context(jnp.zeros(2, jnp.int32), jnp.asarray([1, 2]))
    controls = Controls.of([SamplingParams(temperature=2.0)] * 2)
    got = process(jnp.zeros((2, 4)), controls, context=context, processors=(shift,))
    np.testing.assert_allclose(got, [[0, 0, 0, 0], [0, 5, 0, 0]])


def test_sample_is_categorical_of_the_processed_logits() -> None:
    rows = [CASES["all"], CASES["temperature"], CASES["greedy with penalty and bias"]]
    x, controls, seeds = jnp.asarray(logits()), Controls.of(rows), (5, 2**32 - 1, 0)

    @jax.jit
    def draw(t):
        keys = row_keys(jnp.asarray(seeds, jnp.uint32), jnp.full((3,), t))
        return sample(x, controls, keys, context=CONTEXT)

    processed = process(x, controls, context=CONTEXT)
    for t in range(8):
        keys = [jax.random.fold_in(jax.random.key(seed), t) for seed in seeds]
        want = [int(jax.random.categorical(key, row)) for key, row in zip(keys, processed, strict=True)]
        assert draw(t).tolist() == want


def test_frequencies_follow_the_processed_distribution() -> None:
    params, draws = SamplingParams(temperature=1.2, top_k=12, min_p=0.01), 20_000
    x = jnp.asarray(logits(1))
    keys = row_keys(jnp.full((draws,), 9, jnp.uint32), jnp.arange(draws))
    controls = Controls.of([params])
    tokens = jax.jit(jax.vmap(lambda key: sample(x, controls, key[None])[0]))(keys)
    want = expected(np.asarray(x[0]), params, SEEN[0])
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[want == 0].sum() == 0
    kept = want > 0
    statistic = np.sum((counts[kept] - draws * want[kept]) ** 2 / (draws * want[kept]))
    # The 99.9 % quantile of chi-square with k degrees, by Wilson and Hilferty.
    k = kept.sum() - 1
    assert k >= 5
    assert statistic < k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


def test_controls_that_no_row_uses_are_absent() -> None:
    greedy = Controls.of([SamplingParams(top_p=0.5, top_k=3), SamplingParams(repetition_penalty=1.0)])
    assert jax.tree.leaves(greedy) == []
    other = Controls.of([SamplingParams(temperature=1.0, top_p=0.3), SamplingParams()])
    assert other.top_p.tolist() == pytest.approx([0.3, 1.0])
    assert other.top_k is None


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(temperature=None), "temperature"),
        (dict(temperature="hot"), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=1.5), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=2.0), "top_p"),
        (dict(top_p=math.nan), "top_p"),
        (dict(min_p=1.0), "min_p"),
        (dict(min_p=-0.1), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(repetition_penalty=math.inf), "repetition_penalty"),
        (dict(logit_bias=[1]), "logit_bias"),
        (dict(logit_bias={-1: 1.0}), "logit_bias"),
        (dict(logit_bias={"a": 1.0}), "logit_bias"),
        (dict(logit_bias={1: math.nan}), "logit_bias"),
    ],
)
def test_parameters_out_of_range_are_refused(values: dict, name: str) -> None:
    with pytest.raises(InputError, match=name):
        SamplingParams(**values)
