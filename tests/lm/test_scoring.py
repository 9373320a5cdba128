"""How well a model predicts a text: against whole passes, in windows, with a bounded memory."""

import math

import jax
import numpy as np
import pytest
from tiny_models import whole

from jaxinf.lm import LM
from jaxinf.lm.scoring import summary

TEXT = "def push(self, item):\n    self.items.append(item)\n"


def expected(lm: LM, ids: list[int]) -> np.ndarray:
    scores = np.asarray(jax.nn.log_softmax(whole(lm.model, np.asarray([ids[:-1]]))[0], axis=-1))
    return scores[np.arange(len(ids) - 1), ids[1:]]


def test_a_short_text(lm: LM) -> None:
    got = lm.score(TEXT)
    want = expected(lm, got.tokens)
    np.testing.assert_allclose(got.logprobs, want, atol=1e-4)
    assert got.tokens[0] == lm.tokenizer.bos_id
    assert got.perplexity == pytest.approx(math.exp(-want.mean()), rel=1e-4)
    assert got.bits_per_byte == pytest.approx(-want.sum() / math.log(2) / len(TEXT), rel=1e-4)
    assert lm.score(got.tokens).bits_per_byte is None


def test_a_text_beyond_the_context_is_read_in_windows(lm: LM) -> None:
    ids = np.random.default_rng(0).integers(0, lm.spec.vocab, 3 * lm.context + 11).tolist()
    stride = 30
    got = lm.score(ids, stride=stride).logprobs
    want = expected(lm, ids[: lm.context + 1])
    start = stride
    while len(want) < len(ids) - 1:
        begin = min(start, len(ids) - 1 - lm.context)
        piece = expected(lm, ids[begin : begin + lm.context + 1])
        want = np.concatenate([want, piece[len(want) - begin :]])
        start += stride
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_bounded_memory_is_that_of_generation(lm: LM) -> None:
    ids = lm.tokenizer.encode(TEXT)
    short = lm.score(ids, window=len(ids), sinks=2)
    np.testing.assert_allclose(short.logprobs, lm.score(ids).logprobs, atol=1e-4)
    written = lm.generate(ids, 90, window=16, sinks=2, logprobs=True)
    scored = lm.score(ids + written.tokens, window=16, sinks=2)
    np.testing.assert_allclose(scored.logprobs[len(ids) - 1 :], written.logprobs, atol=1e-4)


def test_without_a_bos_the_first_token_costs_its_share(lm: LM) -> None:
    assert summary([3, 4], np.asarray([-math.log(2)]), 4, None, 16).bits_per_byte == pytest.approx(5 / 4)
    assert summary([3, 4], np.asarray([-math.log(2)]), 4, 3, 16).bits_per_byte == pytest.approx(1 / 4)
