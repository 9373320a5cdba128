"""The compiler's refusals as errors of ours."""

import pytest

from jaxinf.aot import TooLarge
from jaxinf.aot.failures import explain, kind
from pallas_kernels.errors import InputError, UnsupportedError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "space", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem. Scoped "
            "allocation with size 64.00M and limit 16.00M exceeded scoped vmem limit by 48.00M.",
            "vmem",
            64 * MIB,
            16 * MIB,
        ),
        ("Ran out of memory in memory space vmem. Used 256.00M of 127.94M vmem.", "vmem", 256 * MIB, None),
        ("Ran out of memory in memory space smem. Used 1.50M of 1.00M smem.", "smem", 3 * MIB // 2, MIB),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (48.00G) exceeds available "
            "HBM (15.75G). HLO module: jit_f.",
            "hbm",
            48 << 30,
            None,
        ),
        ("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", "hbm", 20 << 30, None),
    ],
)
def test_too_large_says_bytes(text: str, space: str, needed: int, available: int | None) -> None:
    error = explain(RuntimeError(text))
    assert isinstance(error, TooLarge)
    assert (error.space, error.needed, kind(error)) == (space, needed, space)
    if available is not None:
        assert error.available == available
    assert f"{needed:,} bytes" in str(error)
    assert f"{error.available:,} bytes" in str(error)


def test_a_refusal_keeps_its_reason() -> None:
    error = explain(RuntimeError("INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape cast\n\nmore"))
    assert isinstance(error, UnsupportedError)
    assert "unsupported shape cast" in str(error)


def test_errors_of_ours_and_of_the_program_stay() -> None:
    ours = InputError("window=-1")
    assert explain(ours) is ours
    assert kind(ours) == "input"
    assert explain(TypeError("dot_general requires contracting dimensions")) is None
    assert kind(TypeError()) == "defect"
