"""Heads learn from a frozen target, stop, and go on as if they had not stopped."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from jaxinf.cache import Cache
from jaxinf.checkpoint.drafters import load_drafter
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, QKNormSpec, RopeSpec
from jaxinf.models.drafting import EagleHead, EagleSpec, MedusaSpec
from jaxinf.training.data import Batches, Documents
from jaxinf.training.drafters.continuations import continuations, cut_prompts
from jaxinf.training.drafters.loop import HeadTrainer, HeadTraining, Phase, write_log
from jaxinf.training.drafters.measure import agreement, loops, ranks, tokens_per_pass
from jaxinf.training.drafters.rows import Rows
from jaxinf.training.drafters.run import HeadRecipe, probes, train_heads
from jaxinf.training.drafters.tasks import EagleTask, MedusaTask
from jaxinf.training.drafters.unrolled import Unrolled
from jaxinf.training.optimizer import OptimizerSpec
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError

LAYER = LayerSpec(AttentionSpec(2, 1, 16, rope=RopeSpec(16), qk_norm=QKNormSpec()), FFNSpec(48))
EAGLE = EagleTask(EagleSpec(32, LAYER), draft=3)
TASKS = {
    "medusa": MedusaTask(MedusaSpec(32, heads=2)),
    "eagle": EAGLE,
    "mtp": replace(EAGLE, spec=replace(EAGLE.spec, modules=2)),
}
FAST = OptimizerSpec(0.05, 0.02, warmup=0.1)


@pytest.fixture(scope="module")
def target():
    return tiny_models.model(tiny_models.spec(), seed=3)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(0, 64, 40), 50).astype(np.uint16)
    return Documents(tokens, np.asarray([0, 700, 1400, 2000]), 2000)


@pytest.fixture(scope="module")
def rows(target, documents):
    """Text, and what the target writes at temperatures 0 and 1."""
    own = continuations(
        target, cut_prompts(documents, count=12, length=9, seed=0), tokens=24, temperatures=(0.0, 1.0), batch=6
    )
    return Rows(Batches(documents, batch=4, context=32, seed=0), own)


def training(task, steps: int = 24) -> HeadTraining:
    # Rows by the target are of 32 tokens too, so that a phase is one program.
    phases = (Phase(0.5, 32, 1), Phase(1.0, 32, 2)) if isinstance(task, EagleTask) else (Phase(1.0, 32, 2),)
    return HeadTraining(steps, phases, FAST)


@pytest.mark.parametrize("kind", ["medusa", "eagle", pytest.param("mtp", marks=pytest.mark.slow)])
def test_they_learn(target, rows, kind):
    trainer = HeadTrainer(TASKS[kind], target, training(TASKS[kind], 40), rows)
    seen = []
    trainer.run(on_step=seen.append)
    assert [r.step for r in seen] == list(range(1, 41))
    first, last = (np.mean([r.figures["kl_1"] for r in some]) for some in (seen[:4], seen[-8:]))
    assert last < 0.7 * first
    assert {"kl_2", "top1_2"} <= set(seen[-1].figures)
    assert ("kl_2" in seen[0].figures) == (kind == "medusa")
    assert 0 <= seen[-1].figures["top1_1"] <= 1


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_unrolled_steps_are_those_of_drafting(target, kind):
    """Every draft, one token after another with a cache, against all of them at once."""
    task = TASKS[kind]
    head = task.build(1)
    row = jnp.asarray(np.random.default_rng(1).integers(0, 64, (1, 10)), jnp.int32)
    got = jax.jit(lambda: task.drafts(head, target, row, 3))()
    hidden, modules = jax.jit(lambda: target.hidden(row[:, :-1])[0])(), head.spec.modules
    on = jax.jit(lambda given, tokens, cache, m: head(target, given, tokens, cache, module=m), static_argnums=3)
    # What module m makes of the text: the features of the one before it, a column later.
    streams = [hidden]
    for m in range(modules):
        streams.append(on(streams[-1], row[:, 1:], None, m)[0])
        streams[-1] = streams[-1] if m == modules - 1 else jnp.pad(streams[-1], ((0, 0), (1, 0), (0, 0)))[:, :-1]
    for start in range(3, 6):
        made = hidden[:, start : start + 1]
        for s in range(3):
            m, column = min(s, modules - 1), start + s
            # The keys of module m before the draft reaches it, then those of its own steps.
            before = start + m
            if s <= m:
                cache = head.init_cache(1, 16)
                given = streams[m][:, :before]
                _, cache = on(given, row[:, 1 : before + 1], cache, m)
            assert cache.lengths.tolist() == [column]
            made, cache = on(made, row[:, column + 1 : column + 2], cache, m)
            np.testing.assert_allclose(made[0, 0], got[s][0, column], atol=2e-5, rtol=2e-5)


def test_unrolled_attention_refuses_what_it_has_not(target):
    cache = Cache(((Unrolled(),),), jnp.zeros((1,), jnp.int32))
    with pytest.raises(UnsupportedError, match="no branches"):
        cache.commit(jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32))


def test_resumed_is_bitwise_the_same(target, rows, tmp_path):
    task = TASKS["eagle"]
    whole = HeadTrainer(task, target, training(task, 8), rows)
    whole.run()
    first = HeadTrainer(task, target, training(task, 8), rows, tmp_path)
    assert not first.resume()

    def stop(record):
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(on_step=stop)
    first.close()
    second = HeadTrainer(task, target, training(task, 8), rows, tmp_path)
    assert second.resume()
    assert second.step == 5
    second.run()
    second.close()
    for path, value in whole.params.items():
        np.testing.assert_array_equal(np.asarray(second.params[path]), np.asarray(value), err_msg=path)
    assert [r.loss for r in second.records] == [r.loss for r in whole.records]
    write_log(second.records, tmp_path / "log.jsonl")
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        *range(1, 9)
    ]
    stranger = tiny_models.model(tiny_models.spec(), seed=4)
    other = HeadTrainer(task, stranger, training(task, 8), rows, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        other.resume()
    other.close()


def test_rows_are_a_function_of_the_step(rows):
    kinds = [rows.get(step, 16).shape for step in range(4)]
    assert kinds == [(8, 17), (4, 33), (8, 17), (4, 33)]
    np.testing.assert_array_equal(rows.get(3, 16), rows.get(3, 32))
    seen = np.concatenate([rows.get(step, 16) for step in (1, 3, 5)])
    assert len(np.unique(seen, axis=0)) == len(np.unique(rows.own, axis=0))
    alone = Rows(rows.batches)
    np.testing.assert_array_equal(alone.get(5, 32), rows.batches[5])
    with pytest.raises(InputError, match=r"share=1\.5 must be between 0 and 1"):
        Rows(rows.batches, rows.own, 1.5)


def test_continuations_are_the_targets(target, documents):
    prompts = cut_prompts(documents, count=5, length=6, seed=1)
    got = continuations(target, prompts, tokens=4, temperatures=(0.0, 0.9), seed=7, batch=2)
    np.testing.assert_array_equal(got[:, :6], prompts)
    for row in got[::2]:
        logits = tiny_models.whole(target, jnp.asarray(row[None, :-1], jnp.int32))[0]
        np.testing.assert_array_equal(np.argmax(logits, -1)[5:], row[6:])
    other = continuations(target, prompts, tokens=4, temperatures=(0.0, 0.9), seed=9, batch=2)
    np.testing.assert_array_equal(other[::2], got[::2])
    assert (other[1] != got[1]).any()
    with pytest.raises(InputError, match="fewer than one prompt of 9000"):
        cut_prompts(documents, count=1, length=9000, seed=0)


class Oracle(MedusaTask):
    """Drafts the target's own features, wrong at every third column."""

    def drafts(self, head, target, rows, steps):
        true = jnp.roll(target.hidden(rows[:, :-1])[0], -1, axis=1)
        spoiled = jnp.where((jnp.arange(true.shape[1]) % 3 == 2)[None, :, None], -true, true)
        return [spoiled for _ in range(steps)]


def test_what_would_be_accepted_is_counted_exactly(target, documents):
    prompts = cut_prompts(documents, count=3, length=7, seed=2)
    text = continuations(target, prompts, tokens=30, temperatures=(0.0,), batch=3)
    task = Oracle(MedusaSpec(32, heads=3))
    found = ranks(task, task.build(0), target, text, batch=2)
    assert found.shape == (3, 36, 3)
    assert (found[:, -1] == -1).all()
    greedy = found[:, 6:-4]
    right = (np.arange(6, 32)[:, None] + np.arange(3)) % 3 != 2
    assert np.array_equal(greedy == 0, np.broadcast_to(right, greedy.shape))
    shares = agreement(found[:, 6:])
    assert shares[1][0] == pytest.approx(np.mean(right[:, 0]), abs=0.05)
    assert all(a <= b for a, b in zip(shares[1], shares[64] if 64 in shares else shares[8], strict=True))
    # Walked: a pass that begins at a column c of c % 3 == 0 has 2 tokens right, then 1 more by the target: c + 3.
    assert tokens_per_pass(found, 7) == pytest.approx(3.0)
    assert tokens_per_pass(found, 7, depth=1) == pytest.approx(1.5, abs=0.1)


def test_what_repeats_itself_is_known():
    assert loops(np.asarray([1, 2, 3] * 10))
    assert not loops(np.arange(30))


@pytest.mark.parametrize("kind", [pytest.param("medusa", marks=pytest.mark.slow), "mtp"])
def test_from_text_to_a_folder(target, documents, tmp_path, kind):
    recipe = HeadRecipe(
        kind, heads=2, width=32, steps=3, batch=2, context=32, unroll=2, continuations=4, prompt=9, own=24, probe=3
    )
    said, held_out = [], np.asarray(documents.tokens[:100])
    found = train_heads(target, documents, held_out, recipe, tmp_path, note=said.append)
    assert (found["kind"], found["steps"], found["rows"] + found["left_out"]) == (kind, 3, 3)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    made = load_drafter(tmp_path / "export", target)
    assert made.kind == kind
    assert len(made.ranks) == (2 if kind == "medusa" else 5)
    assert [r[0] for r in made.ranks] == pytest.approx(found["agreement"]["1"], abs=1e-4)
    with pytest.raises(CheckpointError, match="pass --resume"):
        train_heads(target, documents, held_out, recipe, tmp_path)
    again = train_heads(target, documents, held_out, recipe, tmp_path, resume=True, note=said.append)
    assert "resumed at step 3" in said
    assert again["agreement"] == found["agreement"]
    assert not [
        line for line in said[said.index("resumed at step 3") - 1 :] if line.startswith("the target continues 4")
    ]


def test_recipes_fit_the_target(target):
    recipe = HeadRecipe("eagle").fitted(replace(target.spec, context=64))
    assert (recipe.context, recipe.prompt, recipe.own) == (64, 16, 48)
    task = recipe.task(target.spec)
    assert isinstance(task.build(0), EagleHead)
    assert task.spec.layer.attention.window is None
    assert [p.length for p in recipe.training(task).phases] == [16, 16, 32]
    with pytest.raises(InputError, match="kind='hydra' must be medusa, eagle"):
        replace(recipe, kind="hydra").task(target.spec)
    with pytest.raises(InputError, match="progress=1"):
        HeadTraining(3, (Phase(0.5, 16, 1),))
    text, first, left_out = probes(target, np.arange(60) % 64, replace(recipe, probe=2))
    assert (text.shape[1], first) == (64, 16)
    assert len(text) + left_out == 2 or left_out == 0
