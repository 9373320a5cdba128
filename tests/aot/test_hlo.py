"""Reading the text of compiled programs."""

from jaxinf.aot import hlo

TEXT = """\
HloModule m, is_scheduled=true

%fused.1 (p.0: f32[8]) -> f32[8] {
  ROOT %neg.1 = f32[8]{0} negate(%p.0)
}

%body.1 (t.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %get.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %fusion.1 = f32[8]{0:T(128)S(1)} fusion(%get.1, /*index=1*/%get.2), kind=kLoop, calls=%fused.1
  ROOT %tuple.1 = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)(2,1)}) tuple(%get.1, %fusion.1)
}

%condition.1 (t.2: (s32[], f32[8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(80)
  ROOT %lt.1 = pred[]{:T(512)} compare(%get.3, %limit.1), direction=LT
}

ENTRY %main.1 (x.1: f32[8]) -> f32[8] {
  %while.1 = (s32[]{:T(128)}, f32[8]{0}) while(%tuple.2), condition=%condition.1, body=%body.1
  %choice.1 = f32[8]{0} conditional(%p, %a, %b), branch_computations={%fused.1, %fused.2}
}
"""


def test_computations_and_the_program() -> None:
    found, entry = hlo.computations(TEXT)
    assert entry == "main.1"
    assert list(found) == ["fused.1", "body.1", "condition.1", "main.1"]


def test_instructions() -> None:
    found, _ = hlo.computations(TEXT)
    get, fusion, result = hlo.instructions(found["body.1"])
    assert (get.name, get.opcode, get.shape) == ("get.1", "get-tuple-element", "s32[]{:T(128)}")
    assert fusion.operands == ("get.1", "get.2")
    assert fusion.called("calls") == "fused.1"
    assert result.shape == "(s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)(2,1)})"
    assert result.opcode == "tuple"


def test_a_loop_that_counts_up_runs_as_often_as_its_condition_says() -> None:
    found, _ = hlo.computations(TEXT)
    loop, choice = hlo.instructions(found["main.1"])
    assert hlo.trips(loop.rest, found) == 80
    assert hlo.times(found)["body.1"] == 80
    assert choice.branches == ("fused.1", "fused.2")


def test_a_loop_of_unknown_length() -> None:
    found, _ = hlo.computations(TEXT.replace("constant(80)", "parameter(0)"))
    (loop, _) = hlo.instructions(found["main.1"])
    assert hlo.trips(loop.rest, found) is None
    assert hlo.times(found)["body.1"] == 1
