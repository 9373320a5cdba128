"""`LM.with_drafter`: names, errors, stats, and what a drafter costs."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from tiny_models import model, spec

from jaxinf import LM, CausalLM, InputError
from jaxinf.generation.speculative import Costs, DraftModel, DraftTree, PromptLookup
from jaxinf.lm import drafting

PROMPTS = [[5, 9, 5, 9, 5], [3, 4, 7, 3, 4]]


def tiny(seed: int, **changes) -> CausalLM:
    return model(dataclasses.replace(spec(), **changes), seed=seed)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(tiny(0), context=256)


@pytest.fixture(scope="module")
def small() -> LM:
    return LM(tiny(1), context=256)


@pytest.fixture(scope="module")
def looking(lm: LM) -> LM:
    return lm.with_drafter("ngram", costs=Costs(1.2))


def test_greedy_answers_are_those_without(lm: LM, small: LM, looking: LM) -> None:
    want = [answer.tokens for answer in lm.generate(PROMPTS, 24)]
    for drafted in (looking, lm.with_drafter(small, 3, adaptive=False)):
        got = drafted.generate(PROMPTS, 24)
        assert [answer.tokens for answer in got] == want
        for answer in got:
            d = answer.stats.drafting
            assert d is not None
            # Whatever stood was written, and each pass wrote one token more.
            assert d.passes + sum(d.accepted) >= d.written == len(answer.tokens) - 1
            assert answer.stats.tokens_per_pass == d.written / d.passes >= 1
            assert all(0 <= a <= o <= d.passes for a, o in zip(d.accepted, d.offered, strict=True))


def test_the_model_as_its_own_drafter_is_always_right(lm: LM) -> None:
    answer = lm.with_drafter(lm, 4, adaptive=False).generate(PROMPTS[0], 21)
    assert answer.tokens == lm.generate(PROMPTS[0], 21).tokens
    assert answer.stats.drafting is not None
    assert answer.stats.drafting.acceptance == (1.0,) * 4
    assert answer.stats.drafting.passes == 4
    assert answer.stats.tokens_per_pass == 5


def test_without_a_drafter_each_token_is_a_pass(lm: LM) -> None:
    stats = lm.generate(PROMPTS[0], 6).stats
    assert (stats.drafting, stats.tokens_per_pass, stats.passes) == (None, 1.0, 6)


def test_samples_streams_stop_and_logprobs(lm: LM, looking: LM) -> None:
    options = dict(temperature=0.9, top_k=40, seed=5, logprobs=2)
    want = lm.generate(PROMPTS[0], 20, n=3, **options)
    got = looking.generate(PROMPTS[0], 20, n=3, **options)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        assert [list(top) for top in ours.top_logprobs] == [list(top) for top in theirs.top_logprobs]
    stream = looking.stream(PROMPTS[0], 20)
    assert "".join(stream) == ""  # token ids have no text
    assert stream.completion is not None
    assert stream.completion.tokens == lm.generate(PROMPTS[0], 20).tokens


def test_eos_ends_a_row_within_what_stood(lm: LM) -> None:
    plain = lm.generate(PROMPTS[0], 21).tokens
    end = plain[7]
    want = lm.generate(PROMPTS[0], 21, eos=end)
    got = lm.with_drafter(lm, 4, adaptive=False).generate(PROMPTS[0], 21, eos=end)
    assert (got.tokens, got.finish_reason) == (want.tokens, "eos")


def test_costs_are_measured_once_and_kept(lm: LM, small: LM, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINF_COMPILATION_CACHE", str(tmp_path / "compiled"))
    drafted = lm.with_drafter(small, 2)
    (kept,) = (tmp_path / "costs").glob("*.json")
    found = json.loads(kept.read_text())
    assert found["verify"] > 0
    assert found["token"] >= 0
    assert drafted.generate(PROMPTS[0], 9).tokens == lm.generate(PROMPTS[0], 9).tokens

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(drafting, "_measured", never)
    assert lm.with_drafter(small, 2).drafter is not None
    kept.write_text("{")
    with pytest.raises(AssertionError, match="measured again"):
        lm.with_drafter(small, 2)


def test_a_drafter_with_too_short_a_context_is_left_out_and_says_so(lm: LM) -> None:
    drafted = lm.with_drafter(DraftModel(tiny(1), tokens=2, limit=16), adaptive=False)
    with pytest.warns(UserWarning, match=r"32 tokens, but the drafter has a context of 16"):
        got = drafted.generate([1] * 8, 25)
    assert got.tokens == lm.generate([1] * 8, 25).tokens
    assert got.stats.drafting is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drafted.generate([1, 2], 4).stats.drafting is not None


def test_what_is_no_drafter_is_refused(lm: LM) -> None:
    other = LM(tiny(1, vocab=37))
    with pytest.raises(InputError, match=r"vocabulary of 37 tokens, but the target's has"):
        lm.with_drafter(other)
    with pytest.raises(InputError, match=r"whole number from 1 to 15"):
        lm.with_drafter("ngram", 0)
    with pytest.raises(InputError, match=r"whole number from 1 to 15"):
        lm.with_drafter("ngram", 16)
    with pytest.raises(InputError, match=r"has its own: set it there"):
        lm.with_drafter(PromptLookup(), 3)
    with pytest.raises(InputError, match=r"drafter=7 must be an LM"):
        lm.with_drafter(7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"there is no model 'nosuch'"):
        lm.with_drafter("nosuch")


def test_another_tokenizer_is_refused(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bytes:
        def __init__(self, shift: int):
            self.vocab_size, self.shift = 256, shift

        def encode(self, text: str) -> list[int]:
            return [(b + self.shift) % 256 for b in text.encode()]

    drafting._same_tokens(Bytes(0), Bytes(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"another tokenizer"):
        drafting._same_tokens(Bytes(0), Bytes(1))  # type: ignore[arg-type]


def test_time_is_split_only_where_costs_tell(lm: LM, small: LM, looking: LM) -> None:
    copied = looking.generate(PROMPTS[0], 9).stats
    assert copied.drafter_seconds == 0
    written = lm.with_drafter(small, 2, costs=Costs(0.5, 0.0, 0.1)).generate(PROMPTS[0], 9).stats
    assert written.drafter_seconds is not None
    assert written.target_seconds is not None
    assert 0 < written.drafter_seconds < written.target_seconds
    tree = DraftTree(small.model, branches=(2,))
    together = lm.with_drafter(tree, costs=Costs(0.5)).generate(PROMPTS[0], 9).stats
    assert (together.drafter_seconds, together.target_seconds) == (None, None)
