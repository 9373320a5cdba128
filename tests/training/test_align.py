"""Losses are their formulas, descent lowers them, an aligned draft is accepted more, and runs resume bit by bit."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from jaxinf import checkpoint
from jaxinf.checkpoint.loading import Loaded
from jaxinf.compression import quantize
from jaxinf.models import CausalLM
from jaxinf.training.align import Aligner, AlignSpec, Contexts, Probe, align, make_contexts, measure
from jaxinf.training.align.losses import DIVERGENCES, acceptance, agreement, compare
from jaxinf.training.align.measure import rejections_gone, report
from jaxinf.training.align.text import distinct_share, encode, split, spread
from jaxinf.training.data import Batches, Documents
from jaxinf.training.optimizer import OptimizerSpec
from pallas_kernels.errors import CheckpointError, InputError

VOCAB = 16


def documents(tokens: int = 2000, vocab: int = VOCAB) -> Documents:
    """Runs that climb by steps of 1 to 3: predictable in part."""
    rng = np.random.default_rng(0)
    text = (np.cumsum(rng.integers(1, 4, tokens)) % vocab).astype(np.uint16)
    return Documents(text, np.array([0, tokens // 3, tokens]), tokens)


@pytest.fixture(scope="module")
def target() -> CausalLM:
    return tiny_models.model(tiny_models.spec(vocab=VOCAB, context=64), seed=1)


@pytest.fixture(scope="module")
def draft() -> CausalLM:
    return tiny_models.model(tiny_models.spec(vocab=VOCAB, context=64, layers=1), seed=2, gain=1.0)


SPEC = AlignSpec(
    loss="tvd", steps=40, batch=4, context=24, prompt=6, optimizer=OptimizerSpec(0.03, 0.01, warmup=0.1), seed=5
)


def aligner(target, draft, folder=None, **changes) -> Aligner:
    spec = replace(SPEC, **changes)
    batches = Batches(documents(), batch=spec.batch, context=spec.context, seed=spec.seed)
    return Aligner(target, draft, spec, batches, folder)


@pytest.fixture(scope="module")
def contexts(target) -> tuple[Contexts, ...]:
    return make_contexts(target, documents(500).tokens, rows=6, length=24, prompt=12)


# --- the formulas, in numpy


def _by_hand(name: str, p: np.ndarray, q: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if name == "forward-kl":
            total += a * np.log(a / b) if a > 0 else 0.0
        elif name == "reverse-kl":
            total += b * np.log(b / a) if b > 0 else 0.0
        elif name == "tvd":
            total += abs(a - b) / 2
        else:
            total += min(a, b)
    return total


def _logs(p: np.ndarray) -> jax.Array:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(p), jnp.float32)


@pytest.mark.parametrize("name", [*DIVERGENCES, "acceptance"])
def test_a_loss_is_its_formula(name):
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.full(5, 0.6), (2, 3, 4))
    function = acceptance if name == "acceptance" else DIVERGENCES[name]
    wanted = [[_by_hand(name, p[i, j], q[i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(function(_logs(p), _logs(q)), wanted, rtol=2e-5)


def test_a_token_that_is_ruled_out_adds_nothing():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.75, 0.0])
    for name, function in DIVERGENCES.items():
        assert float(function(_logs(p), _logs(q))) == pytest.approx(_by_hand(name, p, q), rel=1e-5)


def test_acceptance_is_one_less_the_distance():
    p, q = np.random.default_rng(4).dirichlet(np.full(9, 0.4), (2, 50))
    together = acceptance(_logs(p), _logs(q)) + DIVERGENCES["tvd"](_logs(p), _logs(q))
    np.testing.assert_allclose(together, 1.0, rtol=1e-5)


def test_acceptance_is_how_often_rejection_sampling_accepts():
    rng = np.random.default_rng(8)
    p, q = rng.dirichlet(np.full(6, 0.5), 2)
    drawn = rng.choice(6, 20_000, p=q)
    accepted = np.mean(rng.random(20_000) < p[drawn] / q[drawn])
    assert accepted == pytest.approx(float(acceptance(_logs(p), _logs(q))), abs=0.015)


def test_agreement_is_of_the_likeliest():
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    q = np.array([[0.5, 0.1, 0.4], [0.4, 0.3, 0.3]])
    np.testing.assert_array_equal(agreement(_logs(p), _logs(q)), [1.0, 0.0])


def test_comparing_in_parts_is_comparing_whole(target, draft):
    tokens = jnp.asarray(spread(documents().tokens, 3, 14))
    measures = (*DIVERGENCES.values(), acceptance)
    log_p, log_q = (jax.nn.log_softmax(tiny_models.whole(m, tokens)) for m in (target, draft))
    parts = jax.jit(lambda p, q, x: compare(p, q, x, measures, size=16))(target, draft, tokens)  # 42 = 2 * 16 + 10
    for part, function in zip(parts, measures, strict=True):
        assert part.shape == (3, 14)
        np.testing.assert_allclose(part, function(log_p, log_q), rtol=1e-4, atol=1e-5)


# --- training


@pytest.mark.parametrize("loss", list(DIVERGENCES))
def test_descent_lowers_the_loss_and_raises_acceptance(loss, target, draft, contexts):
    run = aligner(target, draft, loss=loss)
    before = measure(target, run.draft, contexts)
    run.run()
    assert [r.step for r in run.records] == list(range(1, 41))
    first, last = (np.mean([r.loss for r in part]) for part in (run.records[:5], run.records[-5:]))
    assert last < 0.85 * first
    after = measure(target, run.draft, contexts)
    for old, new in zip(before, after, strict=True):
        assert rejections_gone(old.acceptance, new.acceptance) > 0.1
    if loss == "tvd":
        assert all(r.acceptance == pytest.approx(1 - r.loss, abs=1e-5) for r in run.records)


def test_the_target_stays_as_it_is(target, draft):
    before = [np.asarray(x) for x in jax.tree.leaves(target)]
    aligner(target, draft, steps=2).run()
    for a, b in zip(before, jax.tree.leaves(target), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


@pytest.mark.parametrize("source", ["draft", "target"])
def test_resumed_is_bitwise_the_same(source, target, draft, tmp_path):
    options = dict(steps=6, on_policy=0.5, source=source)
    whole = aligner(target, draft, **options)
    whole.run()
    first = aligner(target, draft, tmp_path, **options)
    assert not first.resume()
    first.run(until=3)
    first.close()
    second = aligner(target, draft, tmp_path, **options)
    assert second.resume()
    second.run()
    second.close()
    assert [r.text for r in second.records] == ["given", source] * 3
    assert [replace(r, seconds=0) for r in second.records] == [replace(r, seconds=0) for r in whole.records]
    for path, value in whole.params.items():
        np.testing.assert_array_equal(np.asarray(second.params[path]), np.asarray(value), err_msg=path)


def test_other_settings_do_not_resume(target, draft, tmp_path):
    first = aligner(target, draft, tmp_path, steps=1)
    first.run()
    first.close()
    for other in (
        aligner(target, draft, tmp_path, steps=1, loss="forward-kl"),
        aligner(draft, draft, tmp_path, steps=1),
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            other.resume()
        other.close()


def test_on_policy_rows_are_what_the_draft_writes_now(target, draft):
    run = aligner(target, draft, on_policy=1.0, steps=2)
    rows, text = run.rows()
    given = run.batches[0]
    assert (rows.shape, text) == ((4, 24), "draft")
    np.testing.assert_array_equal(rows[:, :6], given[:, :6])
    assert not np.array_equal(rows, given[:, :-1])
    np.testing.assert_array_equal(run.rows()[0], rows)
    run.params = {path: x * 3 for path, x in run.params.items()}
    assert not np.array_equal(run.rows()[0], rows)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 30), (0.5, 50), (1.0, 100)])
def test_the_share_of_continued_batches(share, count):
    spec = replace(SPEC, on_policy=share)
    assert sum(spec.continues(step) for step in range(100)) == count


# --- measuring


def test_a_model_matches_itself(target, contexts):
    assert [c.name for c in contexts][:2] == ["held-out text", "target's text, temperature 1"]
    for match in measure(target, target, contexts):
        assert match.acceptance == pytest.approx(1.0, abs=1e-5)
        assert match.agreement == 1.0


def test_measuring_is_the_mean_over_places(target, draft, contexts):
    rows = contexts[1].rows
    log_p, log_q = (jax.nn.log_softmax(tiny_models.whole(m, jnp.asarray(rows))) for m in (target, draft))
    (match,) = measure(target, draft, contexts[1:2], batch=4)
    for value, function in ((match.acceptance, acceptance), (match.agreement, agreement)):
        assert value == pytest.approx(float(jnp.mean(function(log_p, log_q)[:, 11:-1])), abs=1e-5)
    assert contexts[1].places == 6 * 12


def test_the_targets_own_text_is_its_own(target, contexts):
    greedy = next(c for c in contexts if "greedy" in c.name)
    logits = np.asarray(tiny_models.whole(target, jnp.asarray(greedy.rows)))
    np.testing.assert_array_equal(greedy.rows[:, 12:], logits.argmax(-1)[:, 11:-1])
    assert greedy.left_out + len(greedy.rows) == 6
    assert all(distinct_share(row[12:]) >= 0.5 for row in greedy.rows)


def test_distinct_share():
    assert distinct_share(np.arange(10)) == 1.0
    assert distinct_share(np.array([1, 2] * 6)) == 2 / 9


def test_the_share_of_rejections_gone():
    assert rejections_gone(0.5, 0.6) == pytest.approx(0.2)
    assert rejections_gone(0.5, 0.4) == pytest.approx(-0.2)
    assert rejections_gone(1.0, 1.0) == 0.0


# --- text


def test_documents_of_any_tokenizer():
    made = encode(["ab", "c"], lambda text: [70_000 + ord(x) for x in text], 7)
    assert made.tokens.tolist() == [7, 70_097, 70_098, 7, 70_099]
    assert (made.starts.tolist(), made.bytes) == ([0, 3, 5], 3)
    assert encode(["ab"], lambda text: [1, 2], None).tokens.tolist() == [1, 2]


def test_the_end_of_a_text_is_held_out():
    made = documents(200)
    part, held_out = split(made, 0.1)
    np.testing.assert_array_equal(np.concatenate([part.tokens, held_out]), made.tokens)
    assert (len(held_out), part.starts.tolist()) == (20, [0, 66, 180])


# --- the whole way


def test_from_a_rounded_draft_to_an_export(target, draft, tmp_path):
    start = Loaded(quantize(draft, "int8"), {}, {"eos_token_id": 3}, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    said: list[str] = []
    found = align(
        target,
        start,
        documents(),
        documents(500).tokens,
        replace(SPEC, steps=20),
        tmp_path / "out",
        tokenizer_files=[tmp_path / "tokenizer.json"],
        probe=Probe(rows=4, length=24, prompt=12),
        note=said.append,
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert (found["steps"], found["tokens"]) == (20, 20 * 4 * 24)
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 20
    exported = checkpoint.load(tmp_path / "out" / "export")
    assert exported.generation == {"eos_token_id": 3}
    assert (tmp_path / "out" / "export" / "tokenizer.json").read_text() == "{}"
    contexts = make_contexts(target, documents(500).tokens, rows=4, length=24, prompt=12, seed=5)
    again = report(contexts, measure(target, start.model, contexts), measure(target, exported.model, contexts))
    for one, other in zip(found["contexts"], again, strict=True):
        assert one["acceptance"]["after"] == pytest.approx(other["acceptance"]["after"], abs=1e-6)
        assert one["acceptance"]["before"] == pytest.approx(other["acceptance"]["before"], abs=1e-3)
        assert one["acceptance"]["rejections_gone"] > 0.05
    assert said == ["the target continues held-out text, to measure on"]
    with pytest.raises(CheckpointError, match="--resume"):
        align(target, start, documents(), documents(500).tokens, SPEC, tmp_path / "out")


# --- what is refused


def test_bad_input(target, draft, tmp_path):
    other = tiny_models.model(tiny_models.spec(vocab=VOCAB + 1, context=64, layers=1))
    with pytest.raises(InputError, match="the draft's vocabulary has 17 tokens and the target's 16: give a draft"):
        aligner(target, other)
    start = Loaded(draft, {}, {}, tmp_path)
    with pytest.raises(InputError, match="give more text"):
        align(target, start, documents(90), documents().tokens, SPEC, tmp_path / "out")
    with pytest.raises(InputError, match="fewer than one piece of 64: give more"):
        align(target, start, documents(), documents(60).tokens, SPEC, tmp_path / "out")
    with pytest.raises(InputError, match="context=65 must be at most 64"):
        aligner(target, draft, context=65)
    for wrong in (
        dict(loss="l2"),
        dict(steps=0),
        dict(on_policy=1.5),
        dict(source="both"),
        dict(on_policy=0.5, prompt=24),
    ):
        with pytest.raises(InputError, match=list(wrong)[-1]):
            replace(SPEC, **wrong)
