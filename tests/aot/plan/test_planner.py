"""Plans by arithmetic: the best mesh, what fits, what would."""

import pytest
from plan_cases import TINY, case

from jaxinf.aot.plan import Plan, compare, limits, planner
from jaxinf.aot.slices import find
from pallas_kernels.errors import InputError, UnsupportedError
from sharding import meshes


def plan(made, tpu: str, **options) -> Plan:
    return planner.plan(made, tpu, compiled=False, **options)


def llama(**fields):
    return case("llama-3.1-70b", **(dict(batch=16, context=4096, prompt=2048) | fields))


def test_a_plan_of_a_large_model() -> None:
    made = plan(llama(quantize="int8"), "v5e-16")
    assert made.fits
    assert made.mesh == "tensor=16"
    # Matrices in int8; embedding and head in bfloat16; every key head twice.
    kept = 2 * 2 * 128_256 * 8192
    twice = 2 * 80 * 8192 * 1024
    matrices = 70_553_706_496 - 2 * 128_256 * 8192
    assert made.per_chip.weights == pytest.approx((matrices + kept + twice) / 16, rel=0.002)
    assert made.per_chip.free > 0
    assert made.decode.step_seconds >= made.decode.terms.roofline > 5e-3
    assert made.decode.tokens_per_second == pytest.approx(16 / made.decode.step_seconds)
    assert made.prefill.seconds >= made.prefill.terms.roofline
    assert made.compiler is None
    assert "no compiler" in made.notes[0]


def test_the_ranking_is_in_order_and_says_why() -> None:
    made = plan(llama(quantize="int8"), "v5e-16")
    fitting = [r for r in made.ranking if r.fits]
    assert [r.step_seconds for r in fitting] == sorted(r.step_seconds for r in fitting)
    assert made.ranking[0].mesh == made.mesh
    assert made.ranking[0].why == ""
    assert all(r.why for r in made.ranking[1:])
    assert "weights to read" in made.ranking[1].why


def test_no_other_mesh_is_faster() -> None:
    made = plan(llama(quantize="int8"), "v5e-16")
    for mesh in ("data=2,tensor=8", "pipeline=2,tensor=8", "data=4,tensor=4"):
        assert plan(llama(quantize="int8"), "v5e-16", mesh=mesh).decode.step_seconds > made.decode.step_seconds


def test_a_narrow_cache_makes_room() -> None:
    """Twice the rows in half the bytes, nearly four times in a quarter, less what activations take."""
    rows = {kind: plan(llama(context=8192, cache=kind), "v5e-16").largest_batch for kind in (None, "int8", "int4")}
    assert 1.7 * rows[None] < rows["int8"] <= 2 * rows[None]
    assert 2.9 * rows[None] < rows["int4"] <= 4 * rows[None]
    with pytest.raises(InputError, match="cache='int2' must be 'int8', 'fp8', 'int4'"):
        plan(llama(cache="int2"), "v5e-16")


def test_what_does_not_fit_says_what_would() -> None:
    made = plan(llama(), "v5e-4")
    assert not made.fits
    assert made.per_chip.free < 0
    assert made.remedy == "--quantize int4 or --tpu v5e-16"
    long = plan(llama(batch=64, context=8192), "v5e-16")
    assert "--cache int8" in long.remedy
    assert plan(llama(batch=64, context=8192, cache="int8"), "v5e-16").fits
    assert (made.largest_batch, made.largest_context) == (0, 0)
    again = plan(llama(), "v5e-16")
    assert again.fits


def test_a_batch_that_is_too_large() -> None:
    made = plan(case("qwen3-8b", batch=512, context=4096, prompt=64), "v6e-4")
    assert not made.fits
    assert f"a batch of at most {made.largest_batch}" in made.remedy
    assert plan(case("qwen3-8b", batch=made.largest_batch, context=4096, prompt=64), "v6e-4", mesh="tensor=4").fits


def test_the_largest_that_fit_are_the_largest() -> None:
    made, where, sizes = llama(quantize="int8"), find("v5e-16"), meshes.parse("tensor=16")
    batch, context = limits.largest(made, where, sizes)

    def fits(**fields) -> bool:
        return limits.peak(llama(quantize="int8", **fields), where, sizes, None) <= where.memory

    assert fits(batch=batch)
    assert not fits(batch=batch + 1)
    assert fits(context=context)
    assert not fits(context=context + 1)


def test_the_context_ends_where_the_model_does() -> None:
    assert limits.largest(case(), find("v6e-4"), meshes.parse("tensor=4"))[1] == TINY.context


def test_a_measured_case_scales() -> None:
    made, where, sizes = llama(quantize="int8"), find("v5e-16"), meshes.parse("tensor=16")
    before = plan(made, "v5e-16").per_chip
    roomy = limits.largest(made, where, sizes, (made, before))
    hungry = type(before)(**(vars(before) | dict(temporaries=4 << 30, peak=before.peak + (4 << 30))))
    assert limits.largest(made, where, sizes, (made, hungry))[0] < roomy[0]


def test_figures_are_of_chips_where_a_chip_has_two_devices() -> None:
    made = plan(case("gemma-3-27b"), "tpu7x:2x2x1")
    assert (made.where.chips, made.where.devices) == (4, 8)
    assert made.per_chip.hbm == 2 * made.where.memory
    assert 4 * made.per_chip.weights > 54e9


def test_slices_side_by_side() -> None:
    small, large = compare(case("qwen3-8b"), ["v5e-4", "v5e-8"], compiled=False)
    assert (small.where.chips, large.where.chips) == (4, 8)
    assert large.decode.step_seconds < small.decode.step_seconds
    for made in (small, large):
        hours = made.where.chips / made.decode.tokens_per_second * 1e6 / 3600
        assert made.chip_hours_per_million_tokens == pytest.approx(hours)
    with pytest.raises(InputError, match="twice"):
        compare(case(), ["v5e-4", "v5e-4"], compiled=False)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(batch=0), "batch=0"),
        (dict(prompt=2000), "prompt=2000.*context=1024"),
        (dict(context=4096), "context=4096 is beyond the 2048"),
        (dict(quantize="int3"), "quantize='int3'"),
    ],
)
def test_bad_sizes(fields: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(case(**fields), "v5e-4")


def test_a_slice_that_nothing_divides() -> None:
    with pytest.raises(InputError, match=r"v5e:3x3.*heads=4"):
        plan(case(batch=1, context=1000, prompt=8), "v5e:3x3")


def test_without_a_compiler_one_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise UnsupportedError("not installed")

    monkeypatch.setattr(planner.topology, "compiler", absent)
    with pytest.raises(UnsupportedError):
        planner.plan(case(), "v5e-4", compiled=True)
    assert planner.plan(case(), "v5e-4").compiler is None
