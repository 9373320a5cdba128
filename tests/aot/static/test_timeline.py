"""Whole programs: operations one after another, copies and collectives beside them."""

import pytest

from jaxinf.aot.hlo import Instruction
from jaxinf.aot.static import Operation, timeline

CLOCK, BANDWIDTH, TOLD = 1e9, 1e9, 5e-6  # a cycle and a byte take a nanosecond


def operation(name: str, cycles: int, read: int = 0, **other) -> Operation:
    fields = dict(
        kernel=False,
        bundles=1,
        instructions=1,
        cycles=cycles,
        time=float(max(cycles, read)),
        read=read,
        written=0,
        copies=0,
        pieces=0,
        steps=1,
        macs=0,
        vmem=0,
        loops=(),
        regions=(),
        spans=(),
        unknown_branches=0,
        unknown_copies=0,
        truncated=False,
    )
    return Operation(name=name, **(fields | other))


def run(body: str, *operations: Operation, rest: str = ""):
    text = f"{rest}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return timeline(
        text, {o.name: o for o in operations}, clock=CLOCK, bandwidth=BANDWIDTH, collective=lambda i: TOLD
    )


A = "  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%f"
B = "  %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%f"
START = "  %c = (f32[250]{0:T(128)S(1)}, f32[250]{0:T(128)}, u32[]{:S(2)}) copy-start(%w)"
DONE = "  %d = f32[250]{0:T(128)S(1)} copy-done(%c)"
LOOP = """\
%body (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} fusion(%p), kind=kLoop, calls=%f
  %r = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
}
"""
WHILE = '  %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}'


def test_operations_follow_each_other() -> None:
    made = run(f"{A}\n{B}", operation("a", 1000), operation("b", 500, read=2000))
    assert made.seconds == pytest.approx(3000e-9)
    assert made.hbm_seconds == pytest.approx(2000e-9)
    assert made.core_seconds == pytest.approx(1500e-9)
    assert made.parts[0].name == "b"


def test_a_copy_runs_beside_what_follows_its_start() -> None:
    assert run(f"{START}\n{A}\n{DONE}", operation("a", 5000)).seconds == pytest.approx(5000e-9)
    assert run(f"{START}\n{A}\n{DONE}", operation("a", 300)).seconds == pytest.approx(1000e-9)


def test_a_copy_within_fast_memory_takes_no_bandwidth() -> None:
    inside = START.replace("f32[250]{0:T(128)}", "f32[250]{0:T(128)S(1)}")
    assert run(f"{inside}\n{A}\n{DONE}", operation("a", 300)).hbm_bytes == 0


def test_what_shares_the_bandwidth_is_never_faster_than_its_bytes() -> None:
    made = run(f"{START}\n{A}\n{DONE}", operation("a", 10, read=1000))
    assert made.seconds == pytest.approx(2000e-9)
    assert made.seconds >= made.hbm_seconds


def test_a_loop_counts_every_trip() -> None:
    made = run(WHILE, operation("a", 1000), rest=LOOP)
    assert made.seconds == pytest.approx(7 * (1000e-9 + TOLD))
    assert made.ici_seconds == pytest.approx(7 * TOLD)
    assert {p.name: p.times for p in made.parts} == {"a": 7, "r": 7}
    assert made.bound == "ICI"


def test_a_collective_that_is_awaited_later_runs_beside() -> None:
    start = "  %s = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}"
    done = "  %e = f32[16]{0} all-gather-done(%s)"
    assert run(f"{start}\n{A}\n{done}", operation("a", 9000)).seconds == pytest.approx(9000e-9)
    assert run(f"{start}\n{A}\n{done}", operation("a", 2000)).seconds == pytest.approx(TOLD)


def test_of_two_branches_the_longer_counts() -> None:
    rest = f"%one (p: f32[8]) -> f32[8] {{\n{A}\n}}\n%two (p: f32[8]) -> f32[8] {{\n{B}\n}}\n"
    body = "  %k = f32[8]{0} conditional(%p, %x, %x), branch_computations={%one, %two}"
    assert run(body, operation("a", 100), operation("b", 900), rest=rest).seconds == pytest.approx(900e-9)


def test_what_cannot_be_followed_is_named() -> None:
    made = run(f"{A}\n{B}", operation("a", 10, kernel=True, unknown_copies=1), operation("b", 10))
    assert made.unknown == ("a",)
    loop = WHILE.replace('backend_config={"known_trip_count":{"n":"7"}}', "metadata={}")
    (once,) = run(f"{B}\n{loop}", operation("a", 10), operation("b", 20), rest=LOOP).endless
    assert (once.name, once.began, once.seconds) == ("w", pytest.approx(20e-9), pytest.approx(10e-9 + TOLD))


def test_a_collective_in_a_fusion_of_its_own() -> None:
    rest = "%g (p: f32[8]) -> f32[8] {\n  ROOT %s = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1}}\n}\n"
    seen: list[Instruction] = []
    text = (
        f"{rest}\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %a = f32[4]{{0}} fusion(%x), kind=kCustom, calls=%g\n}}\n"
    )
    made = timeline(text, {}, clock=CLOCK, bandwidth=BANDWIDTH, collective=lambda i: seen.append(i) or TOLD)
    assert made.seconds == pytest.approx(TOLD)
    assert [i.opcode for i in seen] == ["reduce-scatter"]


FETCH = "  %fetch = (s8[1000]{0:S(1)}, s32[1]{0:S(2)}) custom-call(%w)"
PARTS = """\
  %buffer = s8[1000]{0:S(1)} get-tuple-element(%fetch), index=0
  %flag = s32[1]{0:S(2)} get-tuple-element(%fetch), index=1"""
SUM = "  %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"
USE = "  %use = f32[8]{0} custom-call(%r, %buffer, %flag)"


def fetched(pending: int, rest: int = 0):
    fetch = operation("fetch", 10, read=pending, time=10.0, kernel=True, pending=pending)
    use = operation("use", 100, read=rest, kernel=True, awaited=pending)
    return run("\n".join((FETCH, PARTS, SUM, USE)), fetch, use)


def test_what_a_kernel_leaves_on_its_way_travels_beside_a_collective() -> None:
    """The collective takes 5000 ns, a byte a nanosecond."""
    made = fetched(4000)
    assert made.seconds == pytest.approx(10e-9 + TOLD + 100e-9)
    assert made.hbm_bytes == 4000
    assert made.unknown == ()


def test_what_has_not_come_by_then_is_waited_for() -> None:
    made = fetched(7000)
    assert made.seconds == pytest.approx((7000 + 100) * 1e-9)
    assert next(p for p in made.parts if p.name == "use").seconds == pytest.approx((7000 - 5010 + 100) * 1e-9)


def test_no_more_comes_during_a_collective_than_the_bandwidth_allows() -> None:
    for pending in (1000, 5000, 9000):
        assert fetched(pending, rest=3000).seconds >= (pending + 3000) * 1e-9


def test_waiting_for_what_nobody_began_is_named() -> None:
    assert run(A, operation("a", 10, kernel=True, awaited=100)).unknown == ("a",)
