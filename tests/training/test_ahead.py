"""Look-ahead tokens learn from a frozen target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from jaxinf.checkpoint.drafters import load_drafter
from jaxinf.generation.speculative import PaSS
from jaxinf.models.drafting import AheadSpec
from jaxinf.training.data import Batches, Documents
from jaxinf.training.drafters.ahead import PassTask
from jaxinf.training.drafters.loop import HeadTrainer, HeadTraining, Phase
from jaxinf.training.drafters.rows import Rows
from jaxinf.training.drafters.run import HeadRecipe, train_heads
from jaxinf.training.optimizer import OptimizerSpec
from pallas_kernels.errors import InputError

TASK = PassTask(AheadSpec(32, tokens=2))
ROW = np.random.default_rng(1).integers(0, 64, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module")
def target():
    return tiny_models.model(tiny_models.spec(window=4, layers=2), seed=3, gain=1.5)


@pytest.fixture(scope="module")
def documents():
    tokens = np.tile(np.random.default_rng(0).integers(0, 64, 23), 90).astype(np.uint16)
    return Documents(tokens, np.asarray([0, 700, 1400, len(tokens)]), len(tokens))


@jax.jit
def drafts(head, target):
    return TASK.drafts(head, target, jnp.asarray(ROW), TASK.depth)


def test_drafts_of_all_places_are_those_of_each(target) -> None:
    head = TASK.build(0)
    got = drafts(head, target)
    assert [x.shape for x in got] == [(2, 10, 32)] * 3
    for latest in (1, 4, 8):
        text = jnp.pad(jnp.asarray(ROW[:, : latest + 1]), ((0, 0), (0, 2)))
        want = target.hidden(text, ahead=head.embed[...])[0][:, latest:]
        for s in range(3):
            # Column c is step s of the draft that began at c - s, a place before its latest token.
            if latest - 1 + s < 10:
                np.testing.assert_allclose(got[s][:, latest - 1 + s], want[:, s], atol=1e-4)


def test_the_loss_is_by_its_definition(target) -> None:
    head, count = TASK.build(0), 2
    loss, report = jax.jit(lambda row: TASK.loss(head, target, row, TASK.depth))(ROW)
    features = drafts(head, target)
    true = target.hidden(jnp.asarray(ROW))[0]
    total = 0.0
    for i in range(1, count + 1):
        at = 10 - count - 1 + i  # where look-ahead token i stands: a row of 10 tokens ends with all of them
        p = jax.nn.log_softmax(target.logits(true[:, at]))
        q = jax.nn.log_softmax(target.logits(features[i][:, at - 1]))
        kl = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))
        assert report[f"kl_{i}"] == pytest.approx(kl, rel=1e-3)
        total += 0.8 ** (i - 1) * kl
    assert loss == pytest.approx(total, rel=1e-3)
    with pytest.raises(InputError, match="too short for 2"):
        TASK.loss(head, target, jnp.asarray(ROW[:, :3]), 3)


def test_they_learn_and_the_target_does_not(target, documents) -> None:
    before = jax.tree.map(np.asarray, nnx.state(target))
    train = HeadTraining(40, (Phase(1.0, 16, 3),), OptimizerSpec(0.05, 0.05, warmup=0.1))
    trainer = HeadTrainer(TASK, target, train, Rows(Batches(documents, batch=16, context=16, seed=0)))
    assert list(trainer.params) == ["embed"]
    seen = []
    trainer.run(on_step=seen.append)
    first, last = (np.mean([r.figures["kl_1"] for r in some]) for some in (seen[:4], seen[-8:]))
    assert last < 0.8 * first
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(target))


def test_a_run_leaves_a_folder_that_drafts(target, documents, tmp_path) -> None:
    recipe = HeadRecipe("pass", heads=2, steps=2, batch=2, context=32, continuations=0, probe=2, prompt=4, own=8)
    found = train_heads(target, documents, documents.tokens, recipe, tmp_path)
    assert found["kind"] == "pass"
    assert len(found["tokens_per_pass"]) == 3
    assert found["agreement"]["1"][0] == 1.0  # of the first token, which is the target's own
    read = load_drafter(tmp_path / "export", target)
    drafter = PaSS(read.head, target=read.target)
    drafter.check(target)
    assert drafter.nodes == 3
    with pytest.raises(InputError, match="tokens=0"):
        dataclasses.replace(recipe, heads=0).task(target.spec)
