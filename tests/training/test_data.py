"""Batches: what is read, in what order, and that the step alone decides it."""

import itertools

import numpy as np
import pytest

from jaxinf.training.data import Batches, Documents
from jaxinf.training.loop import TrainSpec, pieces
from jaxinf.training.optimizer import OptimizerSpec, rate_factor, uses_muon
from pallas_kernels.errors import CheckpointError, InputError


def documents(lengths=(40, 3, 17, 25, 60, 1, 30)) -> Documents:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(starts[-1]).astype(np.uint16) + 1
    tokens[starts[:-1]] = 0
    return Documents(tokens, starts, int(starts[-1]))


def test_an_epoch_predicts_each_token_once_in_document_order():
    docs = documents()
    batches = Batches(docs, batch=1, context=8, seed=3)
    rows = [batches[i][0] for i in range(batches.per_epoch)]
    predicted = np.concatenate([row[1:] for row in rows])
    texts = predicted[predicted > 0]
    assert len(set(texts)) == len(texts)
    assert len(predicted) == batches.per_epoch * 8 >= len(docs.tokens) - 8
    # Within a row, neighbours are neighbours in a document, or a document opens.
    for row in rows:
        assert all(b in (0, a + 1) or a == 0 for a, b in itertools.pairwise(row))


def test_epochs_differ_and_steps_repeat():
    batches = Batches(documents(), batch=2, context=16, seed=0)
    n = batches.per_epoch
    first = [batches[i] for i in range(n)]
    second = [batches[n + i] for i in range(n)]
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    again = Batches(documents(), batch=2, context=16, seed=0)
    np.testing.assert_array_equal(again[n + 1], second[1])
    np.testing.assert_array_equal(again[0], first[0])
    other = Batches(documents(), batch=2, context=16, seed=1)
    assert not np.array_equal(other[0], first[0])
    assert first[0].dtype == np.int32
    assert first[0].shape == (2, 17)


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match="do not fill a batch"):
        Batches(documents((5, 5)), batch=2, context=8, seed=0)


def test_documents_are_stored_and_read(tmp_path):
    docs = documents()
    docs.save(tmp_path)
    back = Documents.load(tmp_path)
    np.testing.assert_array_equal(back.tokens, docs.tokens)
    np.testing.assert_array_equal(back.starts, docs.starts)
    assert back.bytes == docs.bytes
    with pytest.raises(CheckpointError, match="no encoded corpus"):
        Documents.load(tmp_path / "absent")


def test_pieces_predict_the_same_tokens():
    rows = np.arange(2 * 13).reshape(2, 13)
    short = pieces(rows, 4)
    assert short.shape == (6, 5)
    assert sorted(zip(short[:, :-1].ravel(), short[:, 1:].ravel(), strict=True)) == sorted(
        zip(rows[:, :-1].ravel(), rows[:, 1:].ravel(), strict=True)
    )


def test_phases():
    spec = TrainSpec(batch=1, context=64, steps=10, phases=((0.5, 16), (0.8, 32)))
    assert [spec.length(p) for p in (0.0, 0.49, 0.5, 0.79, 0.8, 1.0)] == [16, 16, 32, 32, 64, 64]
    with pytest.raises(InputError, match="divide"):
        TrainSpec(batch=1, context=64, steps=10, phases=((0.5, 48),))
    with pytest.raises(InputError, match="steps=0"):
        TrainSpec(batch=1, context=64, steps=0)


def test_the_rate_rises_then_falls_to_nothing():
    spec = OptimizerSpec(warmup=0.1)
    factors = [rate_factor(spec, p) for p in np.linspace(0, 1, 101)]
    assert factors[0] == 0
    assert factors[10] == pytest.approx(1.0)
    assert factors[-1] == 0
    assert factors[55] == pytest.approx(0.5)
    assert np.all(np.diff(factors[10:]) < 0)
    assert np.all(np.diff(factors[:10]) > 0)
    assert rate_factor(OptimizerSpec(warmup=0.0), 0.0) == 1.0


def test_muon_serves_projections_alone():
    assert uses_muon("segments/0/blocks/0/attention/query/kernel", (8, 8))
    assert uses_muon("segments/0/blocks/0/ffn/experts/up", (4, 8, 16))
    assert not uses_muon("embed/table", (32, 8))
    assert not uses_muon("segments/0/blocks/0/ffn/router/kernel", (8, 4))
    assert not uses_muon("final_norm/scale", (8,))
