"""Plans through the TPU compiler, of small models."""

import pytest
from plan_cases import MIXTURE, TINY, case
from tpu_compiler import compiles

from jaxinf.aot import programs
from jaxinf.aot.collectives import Collective
from jaxinf.aot.plan import arithmetic, compiling, planner, sizes
from jaxinf.aot.plan.types import Case
from jaxinf.aot.slices import find
from jaxinf.aot.static import Endless, Timeline
from sharding import meshes

V5E8 = find("v5e-8")


@pytest.mark.parametrize(
    ("group", "axes"),
    [((0, 1), "tensor"), ((0, 2), "expert"), ((0, 4), "data"), ((0, 1, 4, 5), "data+tensor"), ((0,), "")],
)
def test_the_axes_that_a_group_runs_along(group: tuple[int, ...], axes: str) -> None:
    assert compiling.axes_of(group, meshes.parse("data=2,expert=2,tensor=2")) == axes


def test_equal_collectives_are_counted_together() -> None:
    found = [Collective(f"ar.{i}", "all-reduce", 1000, 4, 3, (0, 1, 2, 3)) for i in range(2)]
    found.append(Collective("ag", "all-gather", 10, 2, 1, (0, 4)))
    few, many = sorted(compiling.used(found, V5E8, meshes.parse("data=2,tensor=4")), key=lambda u: u.times)
    assert (many.axis, many.times, many.chips) == ("tensor", 6, 4)
    assert many.sent == pytest.approx(6 * 2 * 3 / 4 * 1000)
    assert (few.axis, few.times) == ("data", 1)


def test_a_prompt_of_many_pieces_takes_its_loop_so_often() -> None:
    loops = (Endless("pieces", 1.0, 0.5), Endless("tokens", 2.0, 0.1))
    line = Timeline(2.2, 1.0, 0.0, 1.0, 1.0, (), endless=loops)
    assert compiling.prefill_seconds(line, case(prompt=1024), 256) == pytest.approx(2.0 + 2 * 0.5)
    assert compiling.prefill_seconds(line, case(prompt=512), 256) == pytest.approx(2.0)
    once = Timeline(2.2, 1.0, 0.0, 1.0, 1.0, (), endless=loops[1:])
    assert compiling.prefill_seconds(once, case(prompt=256), 256) == pytest.approx(2.0)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("made", "axes"),
    [
        (case(), "tensor=2"),
        (case(), "data=2,tensor=4"),
        (case(quantize="int8"), "tensor=4"),
        (case(), "pipeline=2"),
        (case(MIXTURE), "expert=2,tensor=2"),
        (case(), "sequence=2,tensor=2"),
    ],
    ids=str,
)
def test_arithmetic_knows_what_the_compiler_is_given(made: Case, axes: str) -> None:
    pytest.importorskip("libtpu")
    built = programs.built(
        made.spec,
        chip=V5E8.topology,
        mesh=axes,
        part="decode",
        batch=made.batch,
        prompt=made.prompt,
        capacity=made.context,
        quantize=made.quantize,
    )
    parsed = meshes.parse(axes)
    assert sum(w.bytes for w in sizes.weights(made, parsed)) == built.weights
    assert sizes.cache_bytes(made, parsed) == pytest.approx(built.cache, abs=4 * made.batch)


class TestCompiled:
    pytestmark = compiles

    def test_a_plan(self) -> None:
        made = case(batch=8, quantize="int8")
        alone = planner.plan(made, "v5e-4", mesh="data=2,tensor=2", compiled=False)
        whole = planner.plan(made, "v5e-4", mesh="data=2,tensor=2")
        assert whole.compiler
        assert whole.decode.witness == compiling.WITNESS
        assert whole.decode.step_seconds >= alone.decode.terms.roofline
        assert whole.prefill.seconds >= alone.prefill.terms.roofline
        assert whole.per_chip.weights == alone.per_chip.weights
        assert whole.per_chip.peak > whole.per_chip.weights + whole.per_chip.cache
        assert not any("could not be followed" in note for note in whole.notes)
        counted = {(u.axis, u.kind, u.bytes): u.times for u in whole.collectives}
        for use in alone.collectives:
            # Where layers leave their sums to what follows, the first one has a sum of nothing before it.
            assert counted[use.axis, use.kind, use.bytes] - use.times in (0, 1)

    def test_of_two_meshes_the_one_that_compiles_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "NEAR", 100.0)
        made = planner.plan(case(batch=4), "v5e:1x2")
        steps = [r.step_seconds for r in made.ranking if r.witness == compiling.WITNESS]
        assert len(steps) == 2
        assert made.decode.step_seconds == min(steps)

    def test_too_large_for_the_compiler(self) -> None:
        # By arithmetic alone the activations are underestimated by more than is free.
        where = find("v5e-1")
        made = case(TINY, batch=1, context=2048, prompt=2048)
        tight = arithmetic.found(made, where, meshes.parse("")).per_chip
        assert tight.free > 0
        full = case(TINY, batch=4096 * 8, context=2048, prompt=16)
        assert not planner.plan(full, "v5e-1").fits
