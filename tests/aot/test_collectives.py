"""Collectives in the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import needs_compiler

from jaxinf.aot import collectives, lower, topology
from jaxinf.aot.shapes import shapes

HLO = """\
%body.1 (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %ar.1 = f32[8,128]{1,0} all-reduce(%x.1), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add.1
}

%condition.1 (p.2: (s32[], f32[8,128])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%a.1, %b.1), direction=LT
}

%outer.1 (p.3: (s32[])) -> (s32[]) {
  %while.1 = (s32[], f32[8,128]) while(%t.1), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main.1 (x.2: bf16[16,128]) -> bf16[64,128] {
  %while.2 = (s32[]) while(%t.2), condition=%condition.1, body=%outer.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %ag.1 = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%x.2), replica_groups=[2,4]<=[8], dimensions={0}
  %rs.1 = f32[4,128]{1,0} reduce-scatter(%y.2), replica_groups={{0,1,2,3}}, to_apply=%add.1
  ROOT %cp.1 = bf16[16,128]{1,0} collective-permute(%x.2), source_target_pairs={{0,1},{1,2},{2,0}}
}
"""


def test_kinds_bytes_groups_and_times() -> None:
    found = {c.name: c for c in collectives.of(HLO)}
    assert [found[n].kind for n in ("ar.1", "ag.1", "rs.1", "cp.1")] == [
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "collective-permute",
    ]
    assert [found[n].chips for n in ("ar.1", "ag.1", "rs.1", "cp.1")] == [2, 4, 4, 3]
    assert found["ar.1"].bytes == 8 * 128 * 4
    assert found["ar.1"].times == 15
    assert found["ag.1"].bytes == 64 * 128 * 2
    assert found["rs.1"].bytes == 4 * 4 * 128 * 4
    assert found["ag.1"].times == 1


def test_bytes_sent_by_the_ring() -> None:
    found = {c.name: c for c in collectives.of(HLO)}
    assert found["ar.1"].sent == 2 * 1 / 2 * found["ar.1"].bytes
    assert found["ag.1"].sent == 3 / 4 * found["ag.1"].bytes
    assert found["cp.1"].sent == found["cp.1"].bytes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[2])", [2048, 8]),
        ("s4[3]", [2]),
        ("pred[]", [1]),
        ("f8e4m3fn[5]", [5]),
    ],
)
def test_sizes_of_shapes(text: str, sizes: list[int]) -> None:
    assert shapes(text) == sizes


@needs_compiler
def test_a_sharded_product_is_reduced_once_a_layer() -> None:
    mesh = topology.mesh("v5e", (4,), ("tensor",))

    def shape(*size: int, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def layers(x, up, down):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, (up, down))[0]

    compiled = lower(
        layers,
        shape(256, 512, spec=PartitionSpec()),
        shape(6, 512, 2048, spec=PartitionSpec(None, None, "tensor")),
        shape(6, 2048, 512, spec=PartitionSpec(None, "tensor", None)),
        mesh=mesh,
    )
    found = compiled.collectives
    assert {c.kind for c in found} == {"all-reduce"}
    assert sum(c.times for c in found) == 6
    assert {c.chips for c in found} == {4}
    assert {c.bytes for c in found} <= {256 * 512 * 2, 256 * 512 * 4}
