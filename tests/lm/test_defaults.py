"""What a generation_config.json asks for, in a tiny model's answers."""

import math

import pytest
from tiny_models import TOKENIZERS, model, spec

from jaxinf.lm import LM, Tokenizer
from jaxinf.lm.defaults import Defaults, not_done
from pallas_kernels.errors import InputError

PROMPT = "def fibonacci(n):"
NET = model(spec(vocab=384, context=200))


def lm(**generation) -> LM:
    return LM(NET, Tokenizer.from_folder(TOKENIZERS / "byte_level"), {"eos_token_id": []} | generation)


def test_how_long_an_answer_is() -> None:
    prompt = len(lm().tokenizer.encode(PROMPT))
    for generation, new in [
        ({}, 64),
        ({"max_new_tokens": 5}, 5),
        ({"max_length": prompt + 7}, 7),
        ({"max_length": prompt - 1}, 1),
        ({"max_length": 190}, 64),
        ({"max_length": prompt + 7, "max_new_tokens": 9}, 9),
    ]:
        assert len(lm(**generation).generate(PROMPT).tokens) == new
        assert len(lm(**generation).generate(PROMPT, 3).tokens) == 3


def test_strings_that_end_an_answer_and_tokens_that_never_come() -> None:
    free = lm().generate(PROMPT, 12)
    stop, token = free.text[3:5], free.tokens[2]
    asks = lm(stop_strings=[stop], suppress_tokens=[token, 999])
    assert lm(stop_strings=stop).generate(PROMPT, 12).text == free.text[: free.text.index(stop)]
    assert lm(stop_strings=stop).generate(PROMPT, 12, stop=()).text == free.text
    got = asks.generate(PROMPT, 12, stop=())
    assert token not in got.tokens
    assert got.tokens == lm().generate(PROMPT, 12, logit_bias={token: -math.inf}).tokens
    assert asks.generate(PROMPT, 12, stop=(), logit_bias={token: 0.0}).tokens == free.tokens
    # Without a tokenizer there is no text to look for strings in.
    assert LM(NET, None, {"stop_strings": [stop]}).generate([5, 6], 2).finish_reason == "length"


def test_what_is_not_done_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="asks for min_new_tokens=4, num_beams=3 when it generates"):
        lm(num_beams=3, min_new_tokens=4, typical_p=1.0, forced_eos_token_id=None, bad_words_ids=[])
    nothing = {
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "token_healing": False,
        "use_cache": True,
    }
    assert not_done(nothing) == []


@pytest.mark.parametrize(
    ("generation", "complaint"),
    [
        ({"eos_token_id": "x"}, "eos_token_id='x' must be a token id"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id=\[1, -2\] must be"),
        ({"suppress_tokens": 1.5}, "suppress_tokens=1.5 must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ({"max_length": "long"}, "max_length='long' must be a whole number"),
        ({"stop_strings": [1]}, r"stop_strings=\[1\] must be"),
    ],
)
def test_values_that_cannot_be(generation: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=rf"generation_config\.json: {complaint}"):
        Defaults.of(generation)
