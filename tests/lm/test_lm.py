"""LM over tiny random models: text in, text out, and everything that can be asked of it."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_models import counted, model, spec, whole

import jaxinf
from jaxinf.generation import Batch, SamplingParams
from jaxinf.lm import LM, Tokenizer
from jaxinf.lm.request import make_request, sampling_params
from pallas_kernels.errors import InputError, UnsupportedError

CONTEXT = 96
PROMPT = "def fibonacci(n):"
MESSAGES = [{"role": "user", "content": "push item"}]


def test_one_prompt_gives_one_completion(lm: LM) -> None:
    one = lm.generate(PROMPT, 12)
    assert lm.generate([PROMPT], 12)[0].tokens == one.tokens
    ids = lm.tokenizer.encode(PROMPT)
    assert lm.generate(ids, 12).tokens == one.tokens
    assert lm.generate(np.asarray(ids), 12).tokens == one.tokens
    assert [c.tokens for c in lm.generate(np.asarray([ids, ids]), 12)] == [one.tokens] * 2
    assert one.text == lm.tokenizer.decode(ids + one.tokens)[len(PROMPT) :]
    assert (len(one.tokens), one.finish_reason, one.logprobs) == (12, "length", None)
    stats = one.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.cached_tokens) == (len(ids), 12, 0)
    assert 0 < stats.first_token_seconds <= stats.seconds
    assert stats.tokens_per_second > 0


def test_greedy_tokens_are_those_of_whole_passes(lm: LM) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    new = lm.generate(PROMPT, 12, logprobs=2)
    scores = np.asarray(jax.nn.log_softmax(lm.logits([ids + new.tokens])[0], axis=-1))[len(ids) - 1 : -1]
    assert new.tokens == scores.argmax(-1).tolist()
    np.testing.assert_allclose(new.logprobs, scores.max(-1), atol=1e-4)
    for t, best in enumerate(new.top_logprobs):
        assert list(best) == np.argsort(-scores[t])[:2].tolist()
    assert lm.generate(PROMPT, 2, logprobs=True).top_logprobs is None


def test_samples_of_a_prompt(lm: LM) -> None:
    options = dict(temperature=1.2, max_new_tokens=6)
    one = lm.generate(PROMPT, n=3, seed=5, **options)
    assert [c.tokens for c in one] == [lm.generate(PROMPT, seed=5 + i, **options).tokens for i in range(3)]
    many = lm.generate([PROMPT, "class Stack:"], n=2, seed=[5, 9], **options)
    assert [c.tokens for c in many[0]] == [c.tokens for c in one[:2]]
    assert many[1][1].tokens == lm.generate("class Stack:", seed=10, **options).tokens


def test_defaults_come_from_the_generation_config(tokenizer: Tokenizer) -> None:
    published = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1}
    assert sampling_params(published) == SamplingParams(0.6, None, 0.9, None, 1.1)
    assert sampling_params(published, temperature=0.0) == SamplingParams(0.0, None, 0.9, None, 1.1)
    assert sampling_params({**published, "do_sample": False}) == SamplingParams(repetition_penalty=1.1)
    assert sampling_params({"do_sample": True}) == SamplingParams(1.0)
    assert sampling_params({}) == SamplingParams()
    assert sampling_params({}, top_k=5) == SamplingParams(1.0, 5)
    net = model(spec(vocab=tokenizer.vocab_size))
    assert LM(net, tokenizer).eos == (tokenizer.eos_id,)
    assert LM(net, tokenizer, {"eos_token_id": [3, 4]}).eos == (3, 4)
    assert LM(net).eos == ()


def test_eos_is_a_token_but_no_text(lm: LM) -> None:
    free = lm.generate(PROMPT, 12)
    end = free.tokens[5]
    at = free.tokens.index(end)
    got = lm.generate(PROMPT, 12, eos=[end, 0])
    assert (got.tokens, got.finish_reason) == (free.tokens[: at + 1], "eos")
    ids = lm.tokenizer.encode(PROMPT)
    assert got.text == lm.tokenizer.decode(ids + free.tokens[:at])[len(PROMPT) :]


def test_stop_strings_cut_text_and_tokens(lm: LM) -> None:
    free = lm.generate(PROMPT, 40)
    for size in (1, 2, 5):
        for at in range(0, len(free.text) - size, 7):
            stop = free.text[at : at + size]
            got = lm.generate(PROMPT, 40, stop=["never said", stop])
            assert got.text == free.text[: free.text.index(stop)]
            assert got.finish_reason == "stop"
            assert got.tokens == free.tokens[: len(got.tokens)]
            pieces = lm.stream(PROMPT, 40, stop=stop)
            assert "".join(pieces) == got.text
            assert pieces.completion.tokens == got.tokens


def test_a_stopped_row_leaves_the_others_alone(lm: LM) -> None:
    free = lm.generate([PROMPT, "class Stack:"], 30)
    stop = free[0].text[3:6]
    assert stop not in free[1].text
    got = lm.generate([PROMPT, "class Stack:"], 30, stop=stop)
    assert [c.finish_reason for c in got] == ["stop", "length"]
    assert got[1].tokens == free[1].tokens


def test_streams_give_the_text_of_generate(lm: LM) -> None:
    whole = lm.generate(PROMPT, 40, temperature=1.0)
    stream = lm.stream(PROMPT, 40, temperature=1.0)
    assert stream.completion is None
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text == stream.completion.text
    assert stream.completion.tokens == whole.tokens


def test_an_interrupt_returns_what_was_written(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = lm.generate(PROMPT, 40)
    advance, calls = Batch.advance, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            self.state = None  # as within the call, where it is donated
            raise KeyboardInterrupt
        return advance(self, *args, **kwargs)

    monkeypatch.setattr(Batch, "advance", interrupted)
    got = lm.generate([PROMPT, PROMPT], [40, 3])
    assert [c.finish_reason for c in got] == ["interrupted", "length"]
    assert 1 < len(got[0].tokens) < 40
    assert got[0].tokens == free.tokens[: len(got[0].tokens)]
    calls.clear()
    stream = lm.stream(PROMPT, 40)
    text = "".join(stream)
    assert stream.completion.finish_reason == "interrupted"
    assert stream.completion.text == text
    calls.clear()
    stream = lm.stream(PROMPT, 40)
    text = next(stream)
    assert text + stream.stop() == stream.completion.text
    assert (list(stream), stream.completion.finish_reason) == ([], "interrupted")
    calls.clear()
    lm.chat(MESSAGES, 40)
    assert lm.chat(MESSAGES, 2).stats.cached_tokens == 0  # the interrupted call's cache is not trusted


def test_the_context_ends_an_answer(lm: LM) -> None:
    ids = [5] * (CONTEXT - 3)
    got = lm.generate([ids, [5, 6]], 10)
    # The last token need not be read again, so it may follow a full context.
    assert [len(c.tokens) for c in got] == [4, 10]
    assert got[0].finish_reason == "length"
    assert len(lm.generate([5] * CONTEXT, 10).tokens) == 1


def test_bias_and_processors(lm: LM) -> None:
    assert set(lm.generate(PROMPT, 5, logit_bias={77: 1e4}).tokens) == {77}

    def count_up(logits, context):
        return logits.at[:, 10 + context.emitted[0]].add(1e4)

    assert lm.generate(PROMPT, 4, processors=[count_up]).tokens == [10, 11, 12, 13]


def test_logits_of_any_length(lm: LM) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    got = lm.logits([ids])
    assert (got.shape, got.dtype) == ((1, len(ids), lm.spec.vocab), np.float32)
    np.testing.assert_allclose(got, whole(lm.model, np.asarray([ids])), atol=1e-4)


LONG = list(range(20, 44))


@pytest.fixture(scope="module")
def small() -> LM:
    return LM(model(spec(context=48)))


class TestBoundedMemory:
    def test_until_the_window_overflows_nothing_changes(self, small: LM) -> None:
        free = small.generate(LONG, 9, logprobs=True)
        bounded = small.generate(LONG, 9, logprobs=True, window=32, sinks=4)
        assert bounded.tokens == free.tokens
        np.testing.assert_allclose(bounded.logprobs, free.logprobs, atol=1e-4)

    def test_generation_runs_past_the_context(self, small: LM) -> None:
        got = small.generate(LONG, 100, window=16)
        assert len(got.tokens) == 100
        assert len(small.generate([7] * 70, 3, window=16).tokens) == 3

    def test_an_answer_ends_where_positions_do(self, small: LM) -> None:
        assert make_request(small._facts, [7] * 20, 2**40, window=16).limits == [2**31 - 1 - 20]

    def test_memory_stays_bounded(self, small: LM) -> None:
        sizes = {small._engine.new_cache(1, tokens, 16, 4, None).nbytes for tokens in (20, 100, 10_000)}
        assert len(sizes) == 1
        per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, bytes
        assert sizes == {per_token * (16 + 4)}

    def test_the_model_may_be_made_with_a_window(self) -> None:
        net = model(spec(context=48))
        by_call = LM(net).generate(LONG, 30, window=16)
        assert LM(net, window=16).generate(LONG, 30).tokens == by_call.tokens

    def test_learned_positions_still_end(self) -> None:
        net = dataclasses.replace(spec(rope=None, context=48), learned_positions=48)
        lm = LM(model(net))
        with pytest.raises(InputError, match="48"):
            lm.generate([1] * 60, 4, window=16)
        assert len(lm.generate([1] * 40, 60, window=16).tokens) == 9
        assert len(lm.score([1] * 49, window=16).logprobs) == 48
        with pytest.raises(InputError, match="learned 48 positions"):
            lm.score([1] * 50, window=16)


def test_warmup_leaves_nothing_to_compile(tokenizer: Tokenizer) -> None:
    lm = LM(model(spec(vocab=tokenizer.vocab_size, context=CONTEXT)), tokenizer)
    lm.warmup([10, 30], 20, batch=2)
    with counted() as programs:
        lm.generate([[1] * 9, [2] * 7], 20)
        lm.generate([[1] * 9, [2] * 30], 20)
        assert programs == []
        lm.generate([[1] * 9] * 3, 20)
        assert programs


BAD = {
    "empty text": (("",), {}, "empty"),
    "no tokens": (([],), {}, "empty"),
    "an empty row": (([[1], []],), {}, "prompt 1 is empty"),
    "too long": (([1] * (CONTEXT + 1),), {}, f"{CONTEXT + 1} tokens, but the context is {CONTEXT}"),
    "id too high": (([1, 384],), {}, "384"),
    "id too low": (([1, -1],), {}, "-1"),
    "floats": (([1.0, 2.0],), {}, "float64"),
    "float array": ((np.ones((2, 3), np.float32),), {}, "float32"),
    "a cube": ((np.ones((2, 3, 4), int),), {}, "shape"),
    "booleans": (([True, False],), {}, "bool"),
    "text and ids": ((["a", 1],), {}, "integers"),
    "text and rows": ((["a", [1]],), {}, "integers"),
    "a number": ((3,), {}, "int"),
    "None": ((None,), {}, "NoneType"),
    "bytes": ((b"abc",), {}, "bytes"),
    "temperature below zero": ((PROMPT,), dict(temperature=-0.5), "temperature"),
    "temperature nan": ((PROMPT,), dict(temperature=math.nan), "temperature"),
    "top_p of zero": ((PROMPT,), dict(top_p=0.0), "top_p"),
    "top_p of two": ((PROMPT,), dict(top_p=2.0), "top_p"),
    "top_k of zero": ((PROMPT,), dict(top_k=0), "top_k"),
    "top_k beyond int32": ((PROMPT,), dict(top_k=2**31), "top_k"),
    "top_k of infinity": ((PROMPT,), dict(top_k=math.inf), "top_k"),
    "repetition_penalty that vanishes": ((PROMPT,), dict(repetition_penalty=1e-50), "repetition_penalty"),
    "half a surrogate pair": (("a\ud800",), {}, "surrogate"),
    "min_p of one": ((PROMPT,), dict(min_p=1.0), "min_p"),
    "seeds for another batch": (([PROMPT, PROMPT],), dict(seed=[1, 2, 3]), "seed has 3 entries for 2 prompts"),
    "seed below zero": ((PROMPT,), dict(seed=-1), "seed"),
    "seed too high": ((PROMPT,), dict(seed=2**32), "seed"),
    "seed of a float": ((PROMPT,), dict(seed=1.5), "seed"),
    "no new tokens": ((PROMPT, 0), {}, "max_new_tokens"),
    "limits for another batch": (([PROMPT], [1, 2]), {}, "max_new_tokens"),
    "n of zero": ((PROMPT,), dict(n=0), "n=0"),
    "an empty stop": ((PROMPT,), dict(stop=""), "stop"),
    "a stop of a number": ((PROMPT,), dict(stop=[3]), "stop"),
    "a number for a stop": ((PROMPT,), dict(stop=3), "stop"),
    "logprobs below zero": ((PROMPT,), dict(logprobs=-1), "logprobs"),
    "logprobs beyond the vocabulary": ((PROMPT,), dict(logprobs=385), "logprobs"),
    "bias beyond the vocabulary": ((PROMPT,), dict(logit_bias={384: 1.0}), "384"),
    "eos beyond the vocabulary": ((PROMPT,), dict(eos=384), "eos"),
    "a processor of a string": ((PROMPT,), dict(processors=["x"]), "processors"),
    "a number for processors": ((PROMPT,), dict(processors=3), "processors"),
    "sinks without a window": ((PROMPT,), dict(sinks=4), "window"),
    "window of zero": ((PROMPT,), dict(window=0), "window"),
    "sinks below zero": ((PROMPT,), dict(window=8, sinks=-1), "sinks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_compiled(lm: LM, case: str) -> None:
    args, options, words = BAD[case]
    with counted() as programs, pytest.raises(InputError) as caught:
        lm.generate(*args, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert programs == []


@pytest.mark.parametrize("call", ["stream", "score"])
def test_other_calls_refuse_several_prompts(lm: LM, call: str) -> None:
    with pytest.raises(InputError, match="one"):
        getattr(lm, call)([PROMPT, PROMPT])


def test_other_calls_refuse_several_answers(lm: LM) -> None:
    with pytest.raises(InputError, match="one answer"):
        lm.stream(PROMPT, 2, n=2)
    with pytest.raises(InputError, match="one answer"):
        lm.chat(MESSAGES, 2, n=2)


def test_other_bad_input(lm: LM) -> None:
    for tokens in ([1, 2], [[1, 2], [3]], [[1] * (CONTEXT + 1)], [[0.5]]):
        with pytest.raises(InputError):
            lm.logits(tokens)
    with pytest.raises(InputError, match="single token"):
        lm.score([3])
    for stride in (0, CONTEXT + 1, 1.5):
        with pytest.raises(InputError, match="stride"):
            lm.score(PROMPT, stride=stride)
    for lengths in (0, "x", 1.5, [1.5]):
        with pytest.raises(InputError, match="prompt_tokens"):
            lm.warmup(lengths)
    with pytest.raises(InputError, match="batch=0"):
        lm.warmup(4, batch=0)
    bare = LM(model(spec()))
    with pytest.raises(InputError, match="without a tokenizer"):
        bare.generate("text")
    with pytest.raises(InputError, match="needs a tokenizer"):
        bare.generate([1], stop="x")
    for options in (dict(context=0), dict(sinks=2), dict(window=-1)):
        with pytest.raises(InputError):
            LM(model(spec()), **options)


def test_experts_that_choose_among_the_batch_cannot_generate() -> None:
    from jaxinf.layers import AttentionSpec, ExpertChoice, LayerSpec, MoESpec
    from jaxinf.models import ModelSpec, Segment

    layer = LayerSpec(AttentionSpec(2, 2, 8), MoESpec(2, 8, ExpertChoice()))
    lm = LM(model(ModelSpec(20, 16, (Segment((layer,)),), 32)))
    with pytest.raises(UnsupportedError, match="expert-choice"):
        lm.generate([1, 2, 3], 2)
    tokens = [[1, 2, 3, 4, 5]]
    np.testing.assert_allclose(lm.logits(tokens), whole(lm.model, np.asarray(tokens)), atol=1e-4)
    # Nothing pads a text that is scored: experts would choose the padding.
    for ids in ([1, 2, 3, 4, 5, 6], [i * i % 20 for i in range(50)]):
        first, last = ids[:33], ids[-33:]
        want = [scored(lm, first), scored(lm, last)[-(len(ids) - len(first)) :] if ids != first else []]
        np.testing.assert_allclose(lm.score(ids, stride=32).logprobs, np.concatenate(want), atol=1e-4)


def scored(lm: LM, ids: list[int]) -> np.ndarray:
    scores = np.asarray(jax.nn.log_softmax(lm.logits([ids[:-1]])[0], axis=-1))
    return scores[np.arange(len(ids) - 1), ids[1:]]


def test_the_public_face() -> None:
    for name in jaxinf.__all__:
        assert getattr(jaxinf, name).__name__ == name
    assert set(jaxinf.__all__) <= set(dir(jaxinf))
    assert jaxinf.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="nothing"):
        _ = jaxinf.nothing
