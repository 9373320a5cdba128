"""Conversations: turns that build on the cache of those before."""

import pytest
from tiny_models import model, spec

from jaxinf.generation import Runner
from jaxinf.layers import LongRopeSpec
from jaxinf.lm import LM, Tokenizer
from pallas_kernels.errors import InputError

MESSAGES = [{"role": "user", "content": "push item"}]


def test_on_a_mesh(lm: LM) -> None:
    with pytest.warns(UserWarning, match="first 4 of 8"):
        spread = lm.shard("data=2,tensor=2")
    messages = list(MESSAGES)
    for turn in range(2):
        answer = spread.chat(messages, 4)
        assert answer.tokens == lm.generate(lm.chat_tokens(messages), 4).tokens
        assert (answer.stats.cached_tokens > 0) == (turn > 0)
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "and pop"}]


def test_turns_build_on_the_cache(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = Runner.prefill

    def counting(self, prompts, cache, **options):
        read.append(sum(map(len, prompts)))
        return prefill(self, prompts, cache, **options)

    monkeypatch.setattr(Runner, "prefill", counting)
    lm.chat([{"role": "user", "content": "something else"}], 2)
    messages, in_cache = list(MESSAGES), 0
    for turn in range(3):
        tokens = lm.chat_tokens(messages)
        answer = lm.chat(messages, 4)
        assert answer.stats.prompt_tokens == len(tokens) == answer.stats.cached_tokens + read[-1]
        assert answer.stats.cached_tokens >= in_cache
        assert answer.tokens == lm.generate(tokens, 4).tokens
        # The same words once more: all but the last token are in the cache.
        assert lm.chat(messages, 4).tokens == answer.tokens
        assert read[-1] == 1
        in_cache = len(tokens)
        messages += [
            {"role": "assistant", "content": f"answer {turn}"},
            {"role": "user", "content": "pop"},
        ]


def test_a_window_that_has_forgotten_starts_anew(tokenizer: Tokenizer) -> None:
    lm = LM(model(spec(vocab=tokenizer.vocab_size, window=4, context=200)), tokenizer, {"eos_token_id": []})
    long = [{"role": "user", "content": "items " * 12}]
    lm.chat(long, 40)
    short = [{"role": "user", "content": "items items"}]
    tokens = lm.chat_tokens(short)
    got = lm.chat(short, 6)
    assert got.stats.cached_tokens == 0
    assert got.tokens == lm.generate(tokens, 6).tokens


def test_streams_are_turns_of_the_conversation(lm: LM) -> None:
    lm.chat([{"role": "user", "content": "something else"}], 2)
    stream = lm.stream_chat(MESSAGES, 8)
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text
    again = lm.chat(MESSAGES, 8)
    assert again.tokens == stream.completion.tokens
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    next(lm.stream_chat(MESSAGES, 8))  # and left
    assert lm.chat(MESSAGES, 8).stats.cached_tokens == 0


def test_ropes_that_follow_the_length_give_what_a_whole_pass_gives(tokenizer: Tokenizer) -> None:
    rope = LongRopeSpec(8, short=(1.0,) * 4, long=(2.0, 9.0, 4.0, 5.0), original_max=24)
    lm = LM(model(spec(vocab=tokenizer.vocab_size, rope=rope)), tokenizer, {"eos_token_id": []})
    messages, reused = list(MESSAGES), []
    for _ in range(4):
        answer = lm.chat(messages, 6)
        assert answer.tokens == lm.generate(lm.chat_tokens(messages), 6).tokens
        reused.append(answer.stats.cached_tokens > 0)
        messages += [{"role": "assistant", "content": "answer"}, {"role": "user", "content": "pop"}]
    assert answer.stats.prompt_tokens > rope.original_max
    assert reused == [False, True, False, False]


def test_bad_conversations(lm: LM) -> None:
    with pytest.raises(InputError, match="unknown role clown"):
        lm.chat([{"role": "clown", "content": "x"}])
    for messages in ([], "hello", [{"content": "x"}], ["x"], {"role": "user"}):
        with pytest.raises(InputError, match="message"):
            lm.chat(messages)
    bare = LM(model(spec()))
    with pytest.raises(InputError, match="no chat template"):
        bare.chat(MESSAGES)
