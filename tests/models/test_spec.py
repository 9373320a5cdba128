"""Specs: how layers fold into segments, and what is refused."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import ModelSpec, Segment, fold
from pallas_kernels.errors import InputError


def layer(window=None, **changes) -> LayerSpec:
    return LayerSpec(AttentionSpec(**(dict(heads=4, kv_heads=2, head_dim=8, window=window) | changes)), FFNSpec(16))


def unfold(segments) -> list[LayerSpec]:
    return [x for s in segments for _ in range(s.repeats) for x in s.period]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=12))
def test_fold_keeps_the_layers(windows):
    layers = [layer(w) for w in windows]
    assert unfold(fold(layers)) == layers


def test_five_local_layers_to_one_global_and_a_remainder():
    period = [layer(8)] * 5 + [layer(None)]
    segments = fold(period * 10 + [layer(8)] * 2)
    assert segments == (Segment(tuple(period), 10), Segment((layer(8),) * 2))


def test_a_lead_of_other_layers():
    segments = fold([layer(1)] + [layer(2)] * 7)
    assert [(len(s.period), s.repeats) for s in segments] == [(1, 1), (1, 7)]


def test_equal_layers_are_one_block():
    assert fold([layer()] * 80) == (Segment((layer(),), 80),)


def model(one: LayerSpec, **changes) -> ModelSpec:
    return ModelSpec(**(dict(vocab=8, d_model=16, segments=fold([one]), context=8) | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(layer(heads=5)), "heads=5 must be a multiple of kv_heads=2"),
        (lambda: model(layer(rope=RopeSpec(7))), "dim=7 must be even"),
        (lambda: model(layer(rope=RopeSpec(10))), "at most head_dim=8"),
        (lambda: model(layer(0)), "window=0"),
        (lambda: model(layer(), vocab=0), "vocab=0 must be at least 1"),
        (lambda: model(layer(), segments=()), "at least one layer"),
        (
            lambda: model(LayerSpec(layer().attention, MoESpec(2, 8, TokenChoice(top_k=3)))),
            "top_k=3 must be between 1 and experts=2",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
