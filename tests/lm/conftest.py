"""What the tests of LM share: a tiny random model with a tokenizer."""

import pytest
from tiny_models import TOKENIZERS, model, spec

from jaxinf.lm import LM, Tokenizer

CONTEXT = 96


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(TOKENIZERS / "byte_level")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def lm(tokenizer: Tokenizer) -> LM:
    return LM(model(spec(vocab=tokenizer.vocab_size, window=40, context=CONTEXT)), tokenizer, {"eos_token_id": []})
