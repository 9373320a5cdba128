"""Jobs in processes of their own: results, refusals, crashes."""

import time

import pytest
from tpu_compiler import PATHS, needs_compiler

from jaxinf.aot import Job, Report, compile_one, run
from jaxinf.aot.job import case_job
from jaxinf.core.record import from_record, to_record
from pallas_kernels.errors import InputError, JaxinfError

PRODUCT = {"m": 1024, "k": 512, "n": 1024, "bm": 256, "bk": 512, "bn": 256}


def job(name: str, **arguments: object) -> Job:
    return Job(f"aot_programs:{name}", arguments)


@pytest.mark.parametrize("name", ["nowhere", "missing.py:f", "aot_programs:absent"])
def test_a_job_that_cannot_be_found(name: str) -> None:
    with pytest.raises(InputError, match="job="):
        Job(name).make()


def test_a_job_that_makes_something_else() -> None:
    with pytest.raises(InputError, match="gives a int"):
        job("nothing").make()


def test_a_case_is_named() -> None:
    named = case_job("flash_attention", "llama3-8b-prefill-4k", blocks={"q": 1})
    assert named.arguments["blocks"] == {"q": 1}
    with pytest.raises(InputError, match="op='attention'"):
        case_job("attention", "x").make()
    with pytest.raises(InputError, match=r"case='llama3-8b-x', but flash_attention has llama3-8b-prefill-1k"):
        case_job("flash_attention", "llama3-8b-x").make()


@needs_compiler
@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_loses_one_job(workers: int) -> None:
    jobs = [
        job("refused"),
        job("product", **PRODUCT),
        job("fatal"),
        job("broken"),
        job("held", rows=1 << 19),
        job("product", **PRODUCT),
    ]
    found = {id(o.job): o for o in run(jobs, "v5e", workers=workers, paths=PATHS)}
    outcomes = [found[id(j)] for j in jobs]
    assert [o.kind for o in outcomes] == ["input", "", "crash", "defect", "vmem", ""]
    assert outcomes[0].error == "rows=0, but at least one is needed."
    assert "the last words" in outcomes[2].error
    assert "ZeroDivisionError: a defect" in outcomes[3].error
    assert "268,435,456 bytes" in outcomes[4].error
    with pytest.raises(JaxinfError, match="at least one"):
        outcomes[0].result()
    report = outcomes[1].result()
    assert report.estimate == outcomes[5].result().estimate
    assert from_record(Report, to_record(report)) == report


@needs_compiler
def test_a_job_without_end_is_stopped() -> None:
    with pytest.raises(JaxinfError, match="more than 2 s"):
        compile_one(job("endless"), timeout=2, paths=PATHS)


@needs_compiler
def test_who_stops_listening_does_not_wait() -> None:
    outcomes = run([job("refused"), job("endless")], paths=PATHS)
    assert next(outcomes).kind == "input"
    began = time.monotonic()
    outcomes.close()
    assert time.monotonic() - began < 60  # the second job sleeps for ten minutes
