"""Bytes, products and collectives of a model on a mesh, counted by hand."""

import math

import pytest
from plan_cases import MIXTURE, TINY, case

from jaxinf.aot.plan import arithmetic, sizes, traffic
from jaxinf.aot.slices import find
from jaxinf.models import presets
from jaxinf.models.describe import describe
from pallas_kernels.errors import InputError
from sharding import meshes

V5E16 = find("v5e-16")


def weight_bytes(made, **axes: int) -> int:
    return sum(w.bytes for w in sizes.weights(made, axes))


@pytest.mark.parametrize("name", ["llama-3.1-70b", "gemma-3-27b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_on_one_device_there_are_all_weights(name: str) -> None:
    made = case(name)
    assert weight_bytes(made) == describe(presets.preset(name)).bytes
    assert sizes.cache_bytes(made, {}) >= 8 * 1024 * describe(presets.preset(name)).kv_bytes_per_token


def test_int8_halves_the_matrices_and_adds_their_scales() -> None:
    d, q, kv, f, layers, vocab = 256, 256, 128, 512, 4, 1024
    matrices = layers * (d * q + 2 * d * kv + q * d + 3 * d * f)
    columns = layers * (q + 2 * kv + d + 2 * f + d)
    norms = 2 * (layers * 2 * d + d)
    assert weight_bytes(case(quantize="int8")) == matrices + 4 * columns + norms + 2 * 2 * vocab * d
    assert weight_bytes(case()) == 2 * matrices + norms + 2 * 2 * vocab * d


def test_tensor_divides_weights_and_repeats_key_heads_that_are_too_few() -> None:
    whole, half, quarter = (weight_bytes(case(), tensor=n) for n in (1, 2, 4))
    norms = 2 * (4 * 2 * 256 + 256)
    assert half - norms == (whole - norms) // 2
    keys = 2 * 2 * 4 * 256 * 64  # two heads, each with two chips: a chip has one
    assert quarter - norms == (whole - norms - 2 * keys) // 4 + keys


def test_experts_pipeline_and_data_divide_what_they_should() -> None:
    made = case(MIXTURE)
    kinds = {w.kind: w for w in sizes.weights(made, {"expert": 4})}
    assert kinds["experts"].numbers == 4 * 2 * 256 * 256
    assert (
        sum(w.numbers for w in sizes.weights(made, {"expert": 4}) if w.kind == "experts") == 3 * 4 * 2 * 256 * 256
    )
    assert weight_bytes(made, data=8) == weight_bytes(made)
    layers = weight_bytes(made) - weight_bytes(made, pipeline=2)
    assert layers * 2 == weight_bytes(made) - 2 * 2 * 1024 * 256 - 2 * 256


def test_the_cache_is_divided_by_rows_heads_stages_and_tokens() -> None:
    made = case()
    whole = 2 * 4 * 8 * 2 * 1024 * 64 * 2
    assert sizes.cache_bytes(made, {}) == whole
    for axes in ({"data": 2}, {"expert": 4}, {"tensor": 2}, {"pipeline": 4}, {"sequence": 2}):
        assert sizes.cache_bytes(made, axes) == whole // math.prod(axes.values())


def test_windows_keep_their_tokens_alone() -> None:
    made = case("gemma-3-27b", context=8192)
    attention = next(iter(made.spec.layers())).attention
    assert attention.window == 1024
    assert sizes.held(made, attention, {}) == (8, 1024)
    assert sizes.read(made, attention, 8192, {}) == 8 * 1024
    assert sizes.read(made, attention, 100, {}) == 8 * 100


def test_an_int8_cache_has_scales() -> None:
    made = case(cache="int8")
    attention = next(iter(made.spec.layers())).attention
    assert sizes.entry(made, attention, {}) == 2 * 2 * (64 + 4)


def test_a_decode_step_reads_weights_and_cache_once() -> None:
    made, where = case(), find("v5e-1")
    found = arithmetic.found(made, where, meshes.parse(""))
    table = 2 * 1024 * 256  # rows of it alone are read
    read = weight_bytes(made) - table + sizes.cache_bytes(made, {})
    assert found.decode.hbm == pytest.approx(read / where.bandwidth)
    assert found.decode.ici == 0
    assert found.per_chip.peak > read


def test_of_a_mixture_only_chosen_experts_are_read() -> None:
    assert sizes.touched(2 / 8, 1) == pytest.approx(2 / 8)
    assert sizes.touched(2 / 8, 100) == pytest.approx(1.0)
    few, many = (arithmetic.found(case(MIXTURE, batch=b), find("v5e-1"), meshes.parse("")) for b in (1, 64))
    experts = sum(w.bytes for w in sizes.weights(case(MIXTURE), {}) if w.kind == "experts")
    without = few.decode.hbm * V5E16.bandwidth - 2 / 8 * experts
    assert without > 0
    assert many.decode.hbm * V5E16.bandwidth > experts


def test_a_step_is_two_products_for_each_weight() -> None:
    made = case()
    found = arithmetic.found(made, find("v5e-1"), meshes.parse(""))
    matrices = 4 * (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 512) + 1024 * 256
    attention = 4 * 4 * 4 * 64 * 1024
    assert found.decode.mxu == pytest.approx(8 * (2 * matrices + attention) / find("v5e-1").bf16)


@pytest.mark.parametrize(
    ("axes", "kind", "size", "times"),
    [
        ("tensor=2", "all-reduce", 8 * 256 * 2, 2 * 4 + 1),
        ("expert=4", "all-gather", 8 * 256 * 2, 4),
        ("expert=4", "reduce-scatter", 8 * 256 * 4, 4),
        ("sequence=4", "all-reduce", 8 * 4 * (64 + 2) * 4, 4),
        ("pipeline=2", "collective-permute", 4 * 256 * 2, 3),
    ],
)
def test_what_chips_tell_each_other_in_a_step(axes: str, kind: str, size: int, times: int) -> None:
    made = case(MIXTURE if "expert" in axes else TINY)
    found = traffic.uses(made, V5E16, meshes.parse(axes), 1, ring=False)
    (use,) = [u for u in found if u.kind == kind and u.axis == axes.partition("=")[0]]
    assert (use.bytes, use.times) == (size, times)
    assert use.sent == pytest.approx(times * traffic.sent(kind, size, use.chips))
    assert use.seconds > 0


def test_data_parallel_chips_have_nothing_to_say() -> None:
    assert traffic.uses(case(), V5E16, meshes.parse("data=8"), 1, ring=False) == ()


def test_a_ring_sends_keys_and_values_around_once() -> None:
    made = case()
    (use,) = [
        u
        for u in arithmetic.found(made, V5E16, meshes.parse("sequence=4")).prefill_collectives
        if u.kind == "collective-permute"
    ]
    assert (use.bytes, use.times) == (8 * 128 * 2 * 2 * 64 * 2, 3 * 4)


def test_stages_wait_for_each_other() -> None:
    found = arithmetic.found(case(), V5E16, meshes.parse("pipeline=4"))
    assert found.ticks == pytest.approx(7 / 4)  # four micro-batches, three ticks more
    assert arithmetic.decode_seconds(found) == pytest.approx(found.decode.roofline * 7 / 4 + found.decode.ici)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ("tensor=3", r"heads=4.*tensor may be 1, 2, 4"),
        ("pipeline=3", r"repeats=4.*pipeline may be 1, 2, 4"),
        ("sequence=3", r"context=1024.*sequence may be 1, 2, 4, 8, 16"),
        ("data=32", "needs 32 devices, but v5e-16 has 16"),
    ],
)
def test_axes_that_do_not_divide(axes: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        arithmetic.found(case(), V5E16, meshes.parse(axes))


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"experts=8.*expert may be 1, 2, 4, 8"):
        arithmetic.found(case(MIXTURE), V5E16, meshes.parse("expert=3"))


def test_all_meshes_cover_the_slice_and_divide_the_model() -> None:
    found = arithmetic.all_meshes(case(), find("v5e-8"))
    assert all(math.prod(m.values()) == 8 for m in found)
    assert {"tensor": 4, "data": 2, "pipeline": 1, "sequence": 1, "expert": 1} in found
    assert all(m["expert"] == 1 for m in found)
    assert any(m["expert"] == 8 for m in arithmetic.all_meshes(case(MIXTURE), find("v5e-8")))
    assert all(m["data"] == 1 for m in arithmetic.all_meshes(case(batch=1), find("v5e-8")))
