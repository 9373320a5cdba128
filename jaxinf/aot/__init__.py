"""The TPU compiler as a library: what a program needs and how long it takes, without a TPU.

`libtpu` (`pip install "jaxinf[tpu]"`, Linux) compiles for chips that it is only told about.

    from jaxinf import aot

    compiled = aot.lower(fn, *shapes, chip="v6e")         # in this process: read it, save it
    compiled.memory.peak, compiled.collectives

    job = aot.case_job("flash_attention", "llama3-8b-prefill-4k")
    aot.compile_one(job, "v6e").estimate.seconds          # in a process of its own, with the static model

    for outcome in aot.run(jobs, "v5e", workers=2): ...   # many

Times are the static model's (`jaxinf.aot.static`), no measurements.
"""

from jaxinf.aot.collectives import Collective
from jaxinf.aot.failures import TooLarge
from jaxinf.aot.job import Job, case_job
from jaxinf.aot.jobs import Outcome, compile_one, run
from jaxinf.aot.lowering import Compiled, lower
from jaxinf.aot.memory import Memory
from jaxinf.aot.report import Report
from jaxinf.aot.static import Estimate
from jaxinf.aot.topology import Slice, available, compiler, devices, mesh

__all__ = [
    "Collective",
    "Compiled",
    "Estimate",
    "Job",
    "Memory",
    "Outcome",
    "Report",
    "Slice",
    "TooLarge",
    "available",
    "case_job",
    "compile_one",
    "compiler",
    "devices",
    "lower",
    "mesh",
    "run",
]
