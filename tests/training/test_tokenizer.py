"""The byte-level BPE: every text survives, and its size is exact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinf.training.corpus import MANIFEST
from jaxinf.training.run import EMBEDDED
from jaxinf.training.tokenizer import END_OF_TEXT, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    sources = [path.read_text(encoding="utf-8") for path in sorted(MANIFEST.parent.glob("*.py"))]
    return train_tokenizer(sources, vocabulary=700)


def test_size_and_special_token(tokenizer):
    assert tokenizer.get_vocab_size() == 700
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.encode("x" + END_OF_TEXT).ids[-1] == 0


def test_indentation_is_one_token(tokenizer):
    ids = tokenizer.encode("\n        return").ids
    assert tokenizer.decode(ids[:1]) == "\n        "


@given(st.text(max_size=40))
def test_unicode_round_trips(tokenizer, text):
    if END_OF_TEXT not in text:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("blank", ["\r\n", "\t", "\x00", "\x7f", " ", "\u2028", "\ufeff", "\n\n \n", "  x"])
def test_awkward_text_round_trips(tokenizer, blank):
    text = f"{blank}def f():{blank}{blank}pass{blank}"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_byte_is_a_token(tokenizer):
    # Byte-level alphabets have a character for each of the 256 bytes; none may be missing.
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert all(tokenizer.token_to_id(letter) is not None for letter in alphabet)


def test_embedded_models_share_one_tokenizer():
    files = [EMBEDDED / name / "tokenizer.json" for name in ("stdlib", "stdlib-draft")]
    assert files[0].read_bytes() == files[1].read_bytes()
