"""A model's parameters on meshes of eight emulated devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, QKNormSpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, Segment
from jaxinf.models.placing import check, mesh_of, place_abstract, place_model, placements, unplace
from pallas_kernels.errors import InputError, UnsupportedError
from sharding import meshes

HEADS, KV, DIM = 8, 2, 4
ATTENTION = AttentionSpec(HEADS, KV, DIM, rope=RopeSpec(4), qkv_bias=True, qk_norm=QKNormSpec(over="heads"))
DENSE = LayerSpec(ATTENTION, FFNSpec(16))
MIXTURE = LayerSpec(ATTENTION, MoESpec(4, 8, TokenChoice(top_k=2), bias=True, shared=FFNSpec(16)))
SPEC = ModelSpec(30, 16, (Segment((DENSE, MIXTURE), 4), Segment((DENSE,))), 64)


def make(spec=SPEC, layout="stacked") -> CausalLM:
    return CausalLM(spec, rngs=nnx.Rngs(0), layout=layout)


def values(model: CausalLM) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


@pytest.mark.parametrize("layout", ["list", "stacked"])
@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4", "expert=4,tensor=2", "sequence=8", "tensor=2"])
@pytest.mark.filterwarnings("ignore:mesh")
def test_a_model_comes_back_from_a_mesh_as_it_was(layout, mesh: str) -> None:
    model = make(layout=layout)
    placed = place_model(model, meshes.make(mesh))
    back = values(unplace(placed))
    for name, value in values(model).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert mesh_of(model) is None
    assert mesh_of(placed) == meshes.make(mesh)


def test_heads_lie_where_their_queries_are_and_the_vocabulary_is_padded() -> None:
    model = make()
    before, after = values(model), values(place_model(model, meshes.make("tensor=8")))
    key = "segments.0.blocks.1.attention.key.kernel"
    assert after[key].shape == (4, 16, 8 * DIM)
    for chip, shard in enumerate(sorted(after[key].addressable_shards, key=lambda s: s.index[2].start)):
        head = chip * KV // 8
        np.testing.assert_array_equal(shard.data, before[key][:, :, head * DIM : (head + 1) * DIM])
    norm = "segments.0.blocks.1.attention.key_norm.scale"
    assert after[norm].shape == (4, 8, DIM)
    assert after["segments.0.blocks.1.attention.key.bias"].shape == (4, 8 * DIM)
    table = np.asarray(after["embed.table"])
    assert table.shape == (32, 16)
    np.testing.assert_array_equal(table[:30], before["embed.table"])
    assert not table[30:].any()
    assert after["head.kernel"].shape == (16, 32)
    assert after["head.kernel"].addressable_shards[0].data.shape == (16, 4)


def test_stages_hold_their_layers_and_all_have_the_remainder() -> None:
    after = values(place_model(make(), meshes.make("pipeline=4,tensor=2")))
    up = after["segments.0.blocks.1.ffn.experts.up"]
    assert up.sharding.spec == P("pipeline", "expert", None, "tensor")
    assert up.addressable_shards[0].data.shape == (1, 4, 16, 4)
    rest = after["segments.1.blocks.0.ffn.up.kernel"]
    assert rest.sharding.spec == P(None, None, "tensor")


def test_a_model_moves_from_mesh_to_mesh() -> None:
    model = make()
    once = place_model(model, meshes.make("tensor=8"))
    twice = place_model(once, meshes.make("pipeline=2,expert=2,tensor=2"))
    straight = place_model(model, meshes.make("pipeline=2,expert=2,tensor=2"))
    for name, value in values(straight).items():
        assert values(twice)[name].sharding == value.sharding, name
        np.testing.assert_array_equal(values(twice)[name], value, err_msg=name)


def test_an_abstract_model_is_described_as_the_real_one_lies() -> None:
    mesh = meshes.make("expert=2,tensor=4")
    real = values(place_model(make(), mesh))
    described = values(place_abstract(nnx.eval_shape(make), mesh))
    assert real.keys() == described.keys()
    for name, value in real.items():
        got = described[name]
        assert (got.shape, got.dtype, got.sharding) == (value.shape, value.dtype, value.sharding), name
    assert [p.shape for p in placements(nnx.eval_shape(make), mesh.shape)] == [v.shape for v in real.values()]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, "tensor=3 does not divide the model's heads=8, kv_heads=2, ffn=16, expert_ffn=8; "),
        ({"tensor": 3}, "tensor may be 1, 2, 4, 8$"),
        ({"tensor": 16}, "heads=8, expert_ffn=8; tensor may be 1, 2, 4, 8"),
        ({"expert": 8}, "expert=8 does not divide the model's experts=4; expert may be 1, 2, 4"),
        ({"pipeline": 3}, r"pipeline=3 does not divide the model's repeats=4 \(of 2 layers\); .* 1, 2, 4"),
    ],
)
def test_a_mesh_that_does_not_divide_says_what_and_what_would(sizes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(SPEC, sizes)
    with pytest.raises(InputError, match=message):
        placements(nnx.eval_shape(make), sizes)


def test_key_heads_are_neither_split_nor_repeated_unevenly() -> None:
    layer = dataclasses.replace(DENSE, attention=AttentionSpec(12, 6, 4), ffn=FFNSpec(48))
    with pytest.raises(
        InputError, match=r"tensor=4 does not divide the model's kv_heads=6; tensor may be 1, 2, 3, 6"
    ):
        check(ModelSpec(8, 8, (Segment((layer,)),), 8), {"tensor": 4})


def test_a_pipeline_needs_stacks() -> None:
    with pytest.raises(InputError, match='layout="stacked"'):
        placements(make(layout="list"), {"pipeline": 2})
    with pytest.raises(InputError, match=r"repeats=1 \(layers\)"):
        check(ModelSpec(8, 8, (Segment((DENSE,)),), 8), {"pipeline": 2})


def test_parameters_of_other_kinds_are_refused_by_name() -> None:
    model = make()
    model.final_norm.scale = nnx.Param({"packed": model.final_norm.scale[...]}, logical_axes=("embed",))
    with pytest.raises(UnsupportedError, match=r"final_norm\.scale is a dict"):
        placements(model, {"tensor": 2})
