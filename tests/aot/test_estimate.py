"""The static model against work that is known, and against times that others measured."""

import pytest
from tpu_compiler import PATHS, compiles

from jaxinf.aot import Job, compile_one, run
from jaxinf.aot.static import Estimate
from jaxinf.aot.static.report import F32_PASSES

pytestmark = compiles
PRODUCT = {"m": 1024, "k": 512, "n": 1024, "bm": 256, "bk": 512, "bn": 256}


def estimate(chip: str, name: str, **arguments: object) -> Estimate:
    found = compile_one(Job(f"aot_programs:{name}", arguments), chip, paths=PATHS).estimate
    assert found is not None
    return found


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "7x"])
def test_trips_bytes_and_products_of_a_blocked_product(chip: str) -> None:
    found = estimate(chip, "product", **PRODUCT)
    (kernel,) = (o for o in found.operations if o.kernel)
    assert 2 * kernel.macs == 2 * 1024 * 512 * 1024
    # Each row of blocks is read once, each column again for each of the 4 rows.
    left, right, result = 1024 * 512 * 2, 512 * 1024 * 2, 1024 * 1024 * 2
    assert kernel.written == result
    assert found.read in (left + 4 * right, left + right)  # a 7x keeps both operands in VMEM
    assert found.suspect == ()
    assert found.seconds >= found.roofline_seconds
    cores = {"v5p": 2}.get(chip, 1)
    assert found.cores == cores
    # One step a block, and the pipeline's two of filling and draining; two cores share the blocks.
    assert kernel.steps == 16 // cores + 2


@pytest.mark.parametrize("lengths", [[3, 5], [0, 0], [1, 40]])
def test_scalar_operands_decide_what_is_read(lengths: list[int]) -> None:
    found = estimate("v5e", "counted", lengths=lengths)
    (kernel,) = (o for o in found.operations if o.kernel)
    blocks = sum(lengths)
    assert kernel.copies == blocks + 2  # and the lengths, and the result
    assert 0 <= kernel.read - 8 * 128 * 4 * blocks <= 512
    assert found.suspect == ()


PUBLISHED = {  # seconds on a v5e; docs.jax.dev, "Matrix Multiplication" for Pallas on TPUs
    "128 blocks of 4096": (4096, (128, 128, 128), 0.011771515250438824),
    "large blocks of 4096": (4096, (512, 1024, 1024), 0.00088908776990138),
    "large blocks of 8192": (8192, (512, 1024, 1024), 0.006099433819763363),
}
DISPATCH = 0.000105  # what the same page's smallest product took beyond its work


@pytest.mark.slow
def test_times_beside_measured_ones() -> None:
    jobs = {}
    for name, (size, (bm, bk, bn), _) in PUBLISHED.items():
        arguments = {"m": size, "k": size, "n": size, "bm": bm, "bk": bk, "bn": bn}
        jobs[name] = Job("aot_programs:product", arguments)
    found = {id(o.job): o.result().estimate for o in run(jobs.values(), "v5e", paths=PATHS)}
    for name, (_, _, measured) in PUBLISHED.items():
        ratio = (measured - DISPATCH) / found[id(jobs[name])].seconds
        assert 0.88 < ratio < 1.12, name


def example(**changes: object) -> Estimate:
    given: dict = {
        "chip": "v5e",
        "cores": 1,
        "flops": 0.0,
        "bytes": 0.0,
        "dtype": "bfloat16",
        "stated": True,
        "operations": (),
    }
    return Estimate(**(given | changes))


def test_rooflines() -> None:
    assert example(flops=197e12, bytes=819e9).roofline_seconds == pytest.approx(1.0)
    assert example(flops=394e12, dtype="int8").roofline_seconds == pytest.approx(1.0)
    assert example(flops=197e12, dtype="float32").roofline_seconds == pytest.approx(F32_PASSES)
    assert example(chip="7x", bytes=7380e9).roofline_seconds == pytest.approx(2.0)  # half a chip
    assert example(chip="v5p", cores=2, bytes=2765e9).roofline_seconds == pytest.approx(1.0)


def test_a_time_below_the_roofline_is_suspect() -> None:
    assert example(flops=197e12, bytes=1.0, prefetched=int(819e9 / 2)).suspect == (
        "below the FLOP roofline, x0.50",
    )
    assert example(bytes=819e9, prefetched=int(819e9)).suspect == ()
