"""Bits per byte: windows that score each token once, closed forms, and the command from end to end."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, QKNormSpec, RopeSpec
from jaxinf.models import ModelSpec, Segment
from jaxinf.training import recipes
from jaxinf.training.__main__ import main
from jaxinf.training.corpus import write_held_out
from jaxinf.training.data import Documents
from jaxinf.training.evaluate import bits_per_byte, windows, xz_bits_per_byte
from jaxinf.training.loop import Network
from jaxinf.training.tokenizer import train_tokenizer
from pallas_kernels.errors import InputError

VOCAB = 320
TEXTS = ["def f(x):\n    return x\n" * 40, "class A:\n    pass\n" * 50]


def spec() -> ModelSpec:
    attention = AttentionSpec(2, 1, 8, rope=RopeSpec(8), window=None, qk_norm=QKNormSpec())
    return ModelSpec(VOCAB, 16, (Segment((LayerSpec(attention, FFNSpec(16)),)),), 16, tied=True)


def random_documents(tokens: int, size: int) -> Documents:
    values = np.random.default_rng(0).integers(0, VOCAB, tokens).astype(np.uint16)
    return Documents(values, np.array([0, tokens]), size)


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_each_prediction_is_scored_once_with_enough_context(targets, context, data):
    context = min(context, targets)
    stride = data.draw(st.integers(1, context))
    scored = []
    for i, (start, first) in enumerate(windows(targets, context, stride)):
        assert 0 <= start <= targets - context
        assert i == 0 or first >= context - stride
        scored += range(start + first, start + context)
    assert scored == list(range(targets))


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_is_checked(stride):
    with pytest.raises(InputError, match="stride"):
        windows(20, 8, stride)


@pytest.mark.parametrize("tokens", [2, 10, 17, 61])
def test_a_uniform_model_pays_the_logarithm_of_its_vocabulary(tokens):
    network = Network(spec())
    params = jax.tree.map(jnp.zeros_like, network.init(0))
    got = bits_per_byte(network.model(params), random_documents(tokens, 100), context=16, batch=3)
    assert got == pytest.approx((tokens - 1) * math.log2(VOCAB) / 100, rel=1e-6)


def test_one_window_is_the_plain_loss():
    network = Network(spec())
    params = network.init(1)
    documents = random_documents(17, 40)
    rows = jnp.asarray(documents.tokens.astype(np.int32))[None]
    nats = jax.jit(lambda params: network.loss(params, rows, 0.0)[0])(params)
    got = bits_per_byte(network.model(params), documents, context=16)
    assert got == pytest.approx(16 * float(nats) / math.log(2) / 40, rel=1e-5)


def test_no_text_is_refused():
    network = Network(spec())
    with pytest.raises(InputError, match="no text"):
        bits_per_byte(network.model(network.init(0)), random_documents(1, 0), context=16)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A recipe of a few seconds under the name of a real one, and its corpus."""
    tokenizer = train_tokenizer(TEXTS, vocabulary=VOCAB)
    Documents.encode(TEXTS, tokenizer).save(tmp_path / "data")
    tokenizer.save(str(tmp_path / "data" / "tokenizer.json"))
    real = recipes.RECIPES["stdlib"]
    train = replace(real.train, batch=2, context=16, steps=3, phases=())
    small = recipes.Recipe("stdlib", replace(spec(), vocab=tokenizer.get_vocab_size()), train)
    monkeypatch.setitem(recipes.RECIPES, "stdlib", small)
    write_held_out(tmp_path / "held.xz", {f"{i}.py": text.encode() for i, text in enumerate(TEXTS)})
    return tmp_path


def test_the_command_trains_resumes_exports_and_scores(tiny, capsys):
    common = ["stdlib", "--out", str(tiny / "out"), "--data", str(tiny / "data")]
    assert main([*common, "--steps", "2"]) == 0
    assert main(common) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*common, "--resume"]) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    log = (tiny / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3]

    folder = tiny / "out" / "export"
    scoring = ["evaluate", str(folder), "--held-out", str(tiny / "held.xz")]
    assert main([*scoring, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    text = "".join(TEXTS).encode()
    assert record["bytes"] == len(text)
    assert record["xz_bits_per_byte"] == pytest.approx(xz_bits_per_byte(text), abs=1e-4)
    assert 0 < record["bits_per_byte"] < 9
    assert main(scoring) == 0
    assert f"{record['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_errors_are_one_sentence(tmp_path, capsys):
    assert main(["evaluate", "nothing"]) == 2
    assert "no model 'nothing'" in capsys.readouterr().err.replace("\n", " ")
    assert main(["evaluate", "stdlib", "--held-out", str(tmp_path / "absent.xz")]) == 2
    assert "Traceback" not in capsys.readouterr().err
