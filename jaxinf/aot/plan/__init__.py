"""Plans: whether a model fits a slice of TPUs, on which mesh it runs best, and how fast, before one is rented.

    from jaxinf.aot import plan

    spec = presets.preset("llama-3.1-70b")
    case = plan.Case("llama-3.1-70b", spec, batch=16, context=4096, prompt=2048, quantize="int8")
    made = plan.plan(case, "v5e-16")
    made.fits, made.per_chip.peak, made.decode.step_seconds

With libtpu (`pip install "jaxinf[tpu]"`) the programs are compiled for the slice: memory and collectives are the
compiler's own account, times a static model of its schedules. Without it all of it is arithmetic.
"""

from jaxinf.aot.plan.check import check_fits
from jaxinf.aot.plan.planner import compare, plan
from jaxinf.aot.plan.types import Case, Decode, PerChip, Plan, Prefill, Ranked, Terms, Use

__all__ = [
    "Case",
    "Decode",
    "PerChip",
    "Plan",
    "Prefill",
    "Ranked",
    "Terms",
    "Use",
    "check_fits",
    "compare",
    "plan",
]
