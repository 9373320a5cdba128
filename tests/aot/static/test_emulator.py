"""Small programs whose trip counts and copies are known."""

import pytest
from aot_listing import DELAY, V5E, program

from jaxinf.aot.static import emulator
from jaxinf.aot.static.machine import DMA_LATENCY
from jaxinf.aot.static.scalars import POINTER

GRANULES = 8192  # of 32 bytes
BYTES = GRANULES * 32


def counting(trips: int, *body: str) -> list[str]:
    """A loop that runs `body` so often: from bundle 1, its test 5 bundles before its end."""
    return [
        "%s1_s0 = smov.u32 0",
        "%s2_s0 = sphi %s1_s0, %s3_s0",
        *body,
        "%s3_s0 = sadd.s32 1, %s2_s0",
        f"%p4_p0 = scmp.ge.s32.totalorder %s3_s0, {trips}",
        "%5 = sbr.rel (!%p4_p0) target bundleno = 1 (0x1), region = 9",
        *DELAY,
    ]


@pytest.mark.parametrize("trips", [1, 7, 300])
def test_a_loop_runs_as_often_as_its_test_says(trips: int) -> None:
    found = emulator.run(program(*counting(trips, "%v9_v0 = vadd.f32 %v8_v1, %v8_v1", "")))
    assert found.count == [1] + [trips] * (len(found.count) - 1)
    assert found.cycles == found.time == 1 + trips * 10
    assert not found.unknown
    assert not found.truncated


def test_old_and_new_spelling_of_a_move() -> None:
    for move in ("smov", "smov.u32"):
        text = [line.replace("smov.u32", move) for line in counting(5)]
        assert emulator.run(program(*text)).count[1] == 5


def test_a_predicated_move_keeps_the_old_value() -> None:
    moved = "%s7_s3 = smov.u32 (%p6_p1, %s2_s0), 100"
    body = ["%p6_p1 = scmp.ge.s32.totalorder %s2_s0, 2", moved, "%10 = sst [smem:[#allocation9]] %s7_s3"]
    found = emulator.run(program(*counting(2, *body)))
    cells = found.memory._cells
    assert list(cells.values()) == [1]  # the second trip has 1, which is below 2


def test_a_skipped_part_and_its_delay_slots() -> None:
    skip = ["%p1_p0 = scmp.eq.s32.totalorder 0, 0", "%2 = sbr.rel (%p1_p0) target bundleno = 8 (0x8), region = 3"]
    found = emulator.run(program(*skip, *DELAY, "%3 = vnop", "%4 = vnop", "%5 = vnop"))
    assert found.count == [1, 1, 1, 1, 1, 1, 0, 0, 1]


def test_copies_are_counted_and_waited_for() -> None:
    lines = [
        "%s1_s0 = inlined_call_operand.hbm [shape: bf16[8,128], index: 0, kind: input]",
        f"%2 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1_s0, /*size_in_granules=*/{GRANULES}, "
        "/*vmem=*/[#allocation3], /*dst_syncflagno=*/[#allocation4], /*src_stride=*/512, /*dst_stride=*/128, "
        "/*steps_per_stride=*/8",
        f"%3 = dma.done.wait [#allocation4], {GRANULES}",
    ]
    found = emulator.run(program(*lines))
    traffic = found.memory.traffic
    assert (traffic.read, traffic.written, traffic.copies, traffic.unknown) == (BYTES, 0, 1, 0)
    assert traffic.pieces == BYTES // 4096  # eight steps of 512 bytes to a stride of 16 KiB
    seconds = DMA_LATENCY + BYTES / V5E.chip.bandwidth
    assert found.time == pytest.approx(seconds * V5E.chip.clock, abs=4)
    assert found.cycles == 3


def test_a_wait_that_nothing_answers_is_told() -> None:
    assert emulator.run(program("%3 = dma.done.wait [#allocation4], 64")).memory.traffic.unknown == 1


def test_a_predicate_decides_about_a_copy() -> None:
    copy = (
        "%12 = dma.vmem_to_hbm (%p6_p1), /*vmem=*/[#allocation3], /*size_in_granules=*/4, /*hbm=*/0, "
        "/*dst_syncflagno=*/[#allocation4]"
    )
    found = emulator.run(program(*counting(5, "%p6_p1 = scmp.lt.s32.totalorder %s2_s0, 3", copy)))
    assert (found.memory.traffic.copies, found.memory.traffic.written) == (3, 3 * 4 * 32)


def test_values_of_a_scalar_operand_steer_a_loop() -> None:
    lines = [
        "%s20_s5 = inlined_call_operand.hbm [shape: s32[3], index: 1, kind: input]",
        "%21 = dma.hbm_to_smem /*hbm=*/%s20_s5, /*size_in_granules=*/16, /*smem=*/[#allocation7], "
        "/*dst_syncflagno=*/[#allocation2]",
        "%s22_s6 = sld [smem:[#allocation7 + $0x2]]",
        "%s1_s0 = smov.u32 0",
        "%s2_s0 = sphi %s1_s0, %s3_s0",
        "%s3_s0 = sadd.s32 1, %s2_s0",
        "%p4_p0 = scmp.ge.s32.totalorder %s3_s0, %s22_s6",
        "%5 = sbr.rel (!%p4_p0) target bundleno = 4 (0x4), region = 9",
        *DELAY,
    ]
    known = emulator.run(program(*lines), {1: [9, 9, 6]})
    assert known.count[4] == 6
    unknown = emulator.run(program(*lines))
    assert unknown.count[4] == 1
    assert unknown.unknown == {7}


def test_each_core_knows_its_number() -> None:
    lines = [
        "%s1_s0 = sld [smem:[#allocation0]] /* megacore core id :: core id */",
        "%p2_p0 = scmp.ne.s32.totalorder %s1_s0, 0",
        "%3 = sbr.rel (%p2_p0) target bundleno = 8 (0x8), region = 4",
        *DELAY,
        "%4 = vnop",
        "%5 = vnop",
    ]
    assert [emulator.run(program(*lines), core=core).count[7] for core in (0, 1)] == [1, 0]


def test_a_program_without_end_is_cut() -> None:
    found = emulator.run(program(*counting(10**9)), max_blocks=1000)
    assert found.truncated


def test_pointers_of_operands_differ() -> None:
    memory = emulator.run(program("%1 = vnop")).memory
    addresses = [memory.operand(0, "input", False), memory.operand(1, "input", False)]
    addresses += [memory.operand(0, "output", False)]
    assert len(set(addresses)) == 3
    assert min(addresses) >= POINTER


def copying(flag: str, kind: str) -> list[str]:
    return [
        "%s1_s0 = inlined_call_operand.hbm [shape: bf16[8,128], index: 0, kind: input]",
        f"%s2_s1 = inlined_call_operand.sflag [shape: s32[3], index: 2, kind: {kind}]",
        "%s3_s2 = scalar_lea.sflag %s2_s1, 1",
        f"%2 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1_s0, /*size_in_granules=*/{GRANULES}, "
        f"/*vmem=*/[#allocation3], /*dst_syncflagno=*/{flag}, /*src_stride=*/512, /*dst_stride=*/128, "
        "/*steps_per_stride=*/8",
    ]


def test_copies_that_tell_a_result_are_left_on_their_way() -> None:
    found = emulator.run(program(*copying("%s3_s2", "output")))
    assert found.memory.pending == found.memory.traffic.read == BYTES
    assert found.time == found.cycles
    assert not found.memory.traffic.unknown
    assert emulator.run(program(*copying("[#allocation4]", "output"))).memory.pending == 0


def test_a_wait_for_what_came_before_costs_nothing_here() -> None:
    wait = f"%57 = dma.done.wait %s3_s2, {GRANULES}"
    found = emulator.run(program(*copying("[#allocation4]", "input"), wait))
    assert found.memory.traffic.awaited == BYTES
    assert found.time == found.cycles
    assert not found.memory.traffic.unknown
