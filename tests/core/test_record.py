"""Records: what is written is read back, and what is wrong is named."""

import json

import pytest

from jaxinf.core import from_record, to_record
from jaxinf.layers import (
    AttentionSpec,
    FFNSpec,
    LayerNormSpec,
    LayerSpec,
    LongRopeSpec,
    MoESpec,
    Plain,
    QKNormSpec,
    RopeSpec,
    TokenChoice,
    YarnRopeSpec,
)
from jaxinf.models import ModelSpec, fold
from pallas_kernels.errors import InputError

ROPES = [RopeSpec(8), YarnRopeSpec(8, factor=4.0), LongRopeSpec(8, short=(1.0,) * 4, long=(2.0, 3.0, 4.0, 5.0))]


def spec(rope=ROPES[0]) -> ModelSpec:
    attention = AttentionSpec(4, 2, 8, rope=rope, window=5, qk_norm=QKNormSpec(over="width"))
    dense = LayerSpec(attention, FFNSpec(16, Plain("relu2")), norm=LayerNormSpec(bias=False))
    mixed = LayerSpec(attention, MoESpec(4, 8, TokenChoice(score="sigmoid", top_k=3)), placement="sandwich")
    return ModelSpec(11, 16, fold([dense, mixed] * 2 + [dense]), 32, tied=True)


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: type(r).__name__)
def test_a_spec_survives_json(rope):
    original = spec(rope)
    assert from_record(ModelSpec, json.loads(json.dumps(to_record(original)))) == original


def test_defaults_are_left_out():
    assert to_record(RopeSpec(8)) == {"type": "RopeSpec", "dim": 8}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"vocab": "11"}, "spec.vocab='11' must be of type int"),
        ({"vocab": True}, "spec.vocab=True"),
        ({"depht": 3}, "no field depht"),
        ({"segments": 3}, "must be a list"),
        ({"final_norm": {"type": "NoSuchNorm"}}, "unknown type 'NoSuchNorm'"),
        ({"type": "Other"}, "unknown type 'Other'"),
    ],
)
def test_what_is_wrong_is_named(edit, message):
    with pytest.raises(InputError, match=message):
        from_record(ModelSpec, to_record(spec()) | edit)


def test_a_missing_field_is_named():
    record = to_record(spec())
    del record["d_model"]
    with pytest.raises(InputError, match="needs d_model"):
        from_record(ModelSpec, record)


def test_only_data_is_recorded():
    with pytest.raises(InputError, match="cannot record a object"):
        to_record(object())
