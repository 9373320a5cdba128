"""Text from tokens a few at a time: whole characters, and never a part of a stop string."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tiny_models import TOKENIZERS

from jaxinf.generation import Detokenizer, StopStrings
from jaxinf.lm import Tokenizer

KINDS = ["byte_level", "sentencepiece"]
TEXTS = ["naïve café — 東京 🙂 e\u0301", "def f(x):\n    return x", "🙂🙂 \ufffd? 👩‍👩‍👧", "a  b\t c"]


def bytes_decode(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(text=st.text(max_size=12), cuts=st.lists(st.integers(1, 4), min_size=1))
def test_bytes_in_any_pieces_give_the_text(text: str, cuts: list[int]) -> None:
    out, data, sizes = Detokenizer(bytes_decode), list(text.encode()), itertools.cycle(cuts)
    said = []
    while data:
        size = next(sizes)
        said.append(out.push(data[:size]))
        data = data[size:]
        assert text.startswith("".join(said))
    said.append(out.finish())
    assert "".join(said) == text


@given(st.binary(max_size=24))
def test_bytes_that_are_no_text_do_not_hold_it_up(data: bytes) -> None:
    out, said = Detokenizer(bytes_decode), ""
    for i, byte in enumerate(data):
        said += out.push([byte])
        assert len(said) >= len(bytes_decode(data[: max(i - 2, 0)]))
    assert said + out.finish() == bytes_decode(data)


def test_a_wrong_byte_comes_out_once_it_is_certain() -> None:
    out = Detokenizer(bytes_decode)
    said = [out.push([b]) for b in b"a\xffbc\xf0\x9f\x99"]
    assert said[:4] == ["a", "", "\ufffdb", "c"]
    assert said[4:] == ["", "", ""]
    assert out.finish() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3])
def test_tokens_give_the_text_that_follows_the_prompt(kind: str, text: str, size: int) -> None:
    tokenizer = Tokenizer.from_folder(TOKENIZERS / kind)
    assert tokenizer is not None
    ids = tokenizer.encode("some words " + text)
    start = len(tokenizer.encode("some words"))
    whole = tokenizer.decode(ids)
    out = Detokenizer(tokenizer.decode, ids[:start])
    pieces = [out.push(ids[i : i + size]) for i in range(start, len(ids), size)]
    assert "".join([*pieces, out.finish()]) == whole[len(tokenizer.decode(ids[:start])) :]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    data = "€".encode()
    out = Detokenizer(bytes_decode, list(b"ab" + data[:2]))
    assert out.push(list(data[2:] + b"!")) == "€!"


def test_special_tokens_leave_the_space_that_follows() -> None:
    tokenizer = Tokenizer.from_folder(TOKENIZERS / "sentencepiece")
    assert tokenizer is not None
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    out = Detokenizer(tokenizer.decode, ids[:2])
    assert (
        "".join(out.push([t]) for t in [*ids[2:], tokenizer.eos_id])
        == tokenizer.decode(ids)[len(tokenizer.decode(ids[:2])) :]
    )


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1),
)
def test_stop_strings_cut_at_the_first_end(text: str, stops: list[str], sizes: list[int]) -> None:
    ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    want = text[: min(ends)[1]] if ends else text
    out, said, rest, step = StopStrings(stops), "", text, itertools.cycle(sizes)
    while rest and out.found is None:
        size = 1 if ends else next(step)
        said += out.push(rest[:size])
        rest = rest[size:]
        assert want.startswith(said)
    said += out.finish()
    assert said == want
    assert (out.found is not None) == bool(ends)


def test_nothing_is_said_that_may_begin_a_stop_string() -> None:
    out = StopStrings(["</end>"])
    assert [out.push(p) for p in ["a<", "/en", "dless <", "/end", ">b"]] == ["a", "", "</endless ", "", ""]
    assert out.found == "</end>"
    assert out.push("more") == out.finish() == ""
