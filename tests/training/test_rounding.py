"""Training with rounding: it learns, resumes, is exported rounded, and its options are checked."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf import checkpoint
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, QKNormSpec, RopeSpec
from jaxinf.models import ModelSpec, Segment
from jaxinf.quant import QTensor
from jaxinf.training import recipes
from jaxinf.training.__main__ import main
from jaxinf.training.data import Batches, Documents
from jaxinf.training.loop import Network, Trainer, TrainSpec
from jaxinf.training.optimizer import OptimizerSpec
from jaxinf.training.rounding import BITNET, Rounding, finish_qat, rounding_of, start_qat
from jaxinf.training.tokenizer import train_tokenizer
from pallas_kernels.errors import CheckpointError, InputError

TEXTS = ["def f(x):\n    return x\n" * 40, "class A:\n    pass\n" * 50]
CONTEXT = 16
logits = jax.jit(lambda model, tokens: model(tokens))


def spec(vocab: int) -> ModelSpec:
    attention = AttentionSpec(2, 1, 16, rope=RopeSpec(16), qk_norm=QKNormSpec())
    return ModelSpec(vocab, 32, (Segment((LayerSpec(attention, FFNSpec(32)),)),), CONTEXT, tied=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary=300)


@pytest.fixture(scope="module")
def batches(tokenizer) -> Batches:
    return Batches(Documents.encode(TEXTS, tokenizer), batch=4, context=CONTEXT, seed=0)


def recipe(rounding: Rounding | None, steps: int = 12) -> TrainSpec:
    return TrainSpec(4, CONTEXT, steps, optimizer=OptimizerSpec(0.05, 0.02, warmup=0.1), rounding=rounding, seed=3)


@pytest.fixture(scope="module")
def plain(tokenizer, batches) -> Trainer:
    trainer = Trainer(spec(tokenizer.get_vocab_size()), recipe(None), batches)
    trainer.run()
    return trainer


def test_it_learns_what_rounding_to_the_nearest_loses(plain, batches):
    """From the same float32 model, at the same bits."""
    shipped = plain.network.model(plain.params)
    trainer = Trainer(plain.network.spec, recipe(BITNET), batches, start=shipped)
    nearest = finish_qat(start_qat(shipped, BITNET))
    rows = jnp.asarray(batches[0][:, :-1])
    trainer.run()
    losses = [r.loss for r in trainer.records]
    first = -jnp.take_along_axis(jax.nn.log_softmax(logits(nearest, rows)), batches[0][:, 1:, None], -1).mean()
    assert losses[0] == pytest.approx(float(first), rel=1e-4)
    assert losses[0] > plain.records[-1].loss + 0.05
    assert losses[-1] < 0.7 * losses[0]
    assert all(x.dtype == jnp.float32 for x in trainer.params.values())


def test_a_model_to_start_from(plain, batches):
    network = plain.network
    stored = finish_qat(start_qat(network.model(plain.params), Rounding("int8")))
    for path, value in network.params_of(stored).items():
        np.testing.assert_allclose(value, plain.params[path], atol=0.01, err_msg=path)
    with pytest.raises(InputError, match="not of the spec that is trained"):
        Trainer(replace(network.spec, context=8), recipe(None), batches, start=stored)
    assert Network(network.spec) == network
    assert Network(network.spec, BITNET) != network


@pytest.fixture
def tiny(tmp_path, tokenizer, monkeypatch):
    """A recipe of seconds under the name of a real one, its corpus, and a model of it."""
    Documents.encode(TEXTS, tokenizer).save(tmp_path / "data")
    tokenizer.save(str(tmp_path / "data" / "tokenizer.json"))
    real = recipes.RECIPES["stdlib"]
    train = replace(real.train, batch=2, context=CONTEXT, steps=3, phases=())
    small = recipes.Recipe("stdlib", spec(tokenizer.get_vocab_size()), train)
    monkeypatch.setitem(recipes.RECIPES, "stdlib", small)
    return tmp_path


def test_the_command_trains_resumes_and_exports_rounded(tiny, plain, capsys):
    checkpoint.save(tiny / "model", plain.network.model(plain.params))
    common = ["stdlib", "--data", str(tiny / "data"), "--out", str(tiny / "out"), "--start", str(tiny / "model")]
    rounded = [*common, "--round", "int4", "--group", "16"]
    assert main([*rounded, "--steps", "2"]) == 0
    assert main([*rounded[:-1], "32", "--resume"]) == 2
    assert "does not fit this recipe" in " ".join(capsys.readouterr().err.split())
    assert main([*rounded, "--resume"]) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    losses = [json.loads(line)["loss"] for line in (tiny / "out" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[0] < 4  # it went on: fresh parameters give log 300 = 5.7

    config = json.loads((tiny / "out" / "export" / "config.json").read_text())
    assert config["quantization"]["scheme"] == "qat"
    model = checkpoint.load(tiny / "out" / "export").model
    matrices = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model))]
    stored = [x for x in matrices if isinstance(x, QTensor)]
    assert len(stored) == 7
    assert {(str(x.values.dtype), x.shape[-2] // x.groups) for x in stored} == {("int4", 16)}
    assert model.dtype == jnp.bfloat16


def test_options_are_checked(tiny, capsys):
    def says(*options: str) -> str:
        assert main(["stdlib", "--data", str(tiny / "data"), "--out", str(tiny / "out"), *options]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "must be one of int8, int4" in says("--round", "int3")
    assert "give --round a format too" in says("--group", "32")
    assert "leave out group" in says("--round", "b1.58", "--group", "32")
    assert "group=24 does not divide the 32 input channels" in says(
        "--round", "int4", "--group", "24", "--start", "none"
    )
    assert "no model 'nowhere'" in says("--round", "int4", "--start", "nowhere")
    assert "rate=0.0 must be above 0" in says("--rate", "0")
    assert rounding_of("b1.58") == BITNET


def test_checkpoints_of_another_rounding_are_refused(plain, batches, tmp_path):
    first = Trainer(plain.network.spec, recipe(BITNET, 1), batches, tmp_path)
    first.run()
    first.close()
    second = Trainer(plain.network.spec, recipe(None, 1), batches, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        second.resume()
    second.close()
