"""Reading dumps: what the compiler writes around and into bundles."""

import pytest
from aot_listing import DELAY, V5E, program

from jaxinf.aot.static.bundles import Program, Use, strip_comments
from jaxinf.aot.static.machine import machine
from pallas_kernels import chips

DUMP = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %s10_s0 = inlined_call_operand.hbm [shape: bf16[8,128], index: 0, kind: input] /* a window
of more than one line: { not a bundle } */  ;;  %s11_s1 = smov.u32 0 }
   0x1 LB: > { %s12_s2 = sadd.s32 1, %s11_s1 /* outer /* inner */ still outer */ }
   0x2   :  {}
   0x3   : > { %15 = sbr.rel (!%p14_p0) target bundleno = 1 (0x1), region = 7 } /* End region 3 */
   0x4   :  { %16 = vmatmul.bf16.gmra.mxu0 %v1_v0  ;;  %3820 = sst [smem:[#allocation35_spill]] %s12_s2 }
"""


def test_bundles_instructions_and_branches() -> None:
    parsed = Program.parse("op", DUMP, V5E)
    assert [len(b) for b in parsed.bundles] == [2, 1, 0, 1, 2]
    assert parsed.bundles[1] == ["%s12_s2 = sadd.s32 1, %s11_s1"]
    branch = parsed.branches[3]
    assert (branch.predicate, branch.target, branch.region) == ("!%p14_p0", 1, 7)
    assert parsed.definitions["12"].startswith("sadd")
    assert parsed.spills == {"allocation35_spill": "%s12_s2"}
    assert not parsed.by_core


@pytest.mark.parametrize("note", ["core id", "megacore core id :: core id"])
def test_a_program_that_asks_for_its_core(note: str) -> None:
    assert program(f"%s3_s9 = sld [smem:[#allocation0]] /* {note} */").by_core


def test_labels_stay_and_comments_go() -> None:
    assert strip_comments("a /*size=*/5 /* x /* y */ z */ b").split() == ["a", "size=5", "b"]


@pytest.mark.parametrize(
    ("chip", "instruction", "cycles"),
    [
        ("v5e", "vmatmul.bf16.gmra.mxu0", 16 * 128 * 128),
        ("v5e", "vmatmul.f32.gmra.mxu0", 8 * 128 * 128),
        ("v5e", "vmatmul.s8.gmra.mxu0", 2 * 16 * 128 * 128),
        ("v6e", "vmatmul.mubr.bf16.mxu0", 8 * 2 * 256 * 256),
        ("7x", "vmatmul.mubr.s8.mxu0", 8 * 2 * 256 * 256),  # no faster than bfloat16 there
        ("v5e", "vadd.f32", 0),
    ],
)
def test_multiply_adds_of_a_product(chip: str, instruction: str, cycles: int) -> None:
    assert program(f"%1 = {instruction} %v2_v0", on=machine(chips.find(chip))).macs == [cycles]


@pytest.mark.parametrize("first", ["MXU", "MATMUL, MATPUSH"])
def test_use_of_the_units_by_name(first: str) -> None:
    extra = first.count(",")
    head = f"== CAPACITY:\n{first}, XLU, VALU\n {'4 ' * (1 + extra)} 3 4\n== UTILIZATION:\n"
    use = Use.parse(head + f"{'2 ' * (1 + extra)} 0 1\n{'4 ' * (1 + extra)} 3 0\n")
    assert use.capacity["MXU"] == 4
    assert [row["MXU"] for row in use.rows] == [2, 4]
    assert [row["VALU"] for row in use.rows] == [1, 0]


def test_delay_matches_the_machine() -> None:
    assert len(DELAY) == V5E.delay
