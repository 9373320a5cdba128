"""Plans beside what others measured on real TPUs with their programs: roofline, our prediction, published.

    python benchmarks/plan_vs_published.py --arithmetic                    (at once: roofline and arithmetic)
    python benchmarks/plan_vs_published.py                                 (extra: tpu; minutes)
    python benchmarks/plan_vs_published.py --case 70b-batch8,70b-v6e8 --json published.json

Ours is the time of our own programs as a static model of the TPU compiler's schedules sees them: nothing here has
run on a TPU, and no constant is fitted to these cases. The roofline is the least that bytes or products take at
peak rates. Both are of the published workload: where requests are served, each costs its prefill and a decode step
for each new token, at the average length of its text.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxinf.aot import plan as plans
from jaxinf.models import presets
from pallas_kernels.errors import JaxinfError

Measure = Literal["tokens/s a row", "ms a token", "tokens/s"]


@dataclass(frozen=True)
class Published:
    """A measurement of others.

    Attributes:
      prompt, new: tokens of a request; a decode step is timed at prompt + new / 2 tokens, or at `context`.
      measure: "tokens/s a row" and "ms a token" of decoding alone; "tokens/s" of all rows, prefill included.
      value: in that unit. at_least: the source gives a bound.
      source: where it was published; note: what differs from our case.
    """

    name: str
    model: str
    tpu: str
    mesh: str
    batch: int
    measure: Measure
    value: float
    source: str
    prompt: int = 1024
    new: int = 1024
    context: int | None = None
    quantize: str | None = None
    at_least: bool = False
    note: str = ""


CASES = (
    Published(
        name="70b-batch8",
        model="llama-3.1-70b",
        tpu="v5e-16",
        mesh="tensor=16",
        batch=8,
        context=2048,
        quantize="int8",
        measure="tokens/s a row",
        value=159.0,
        source="jax-llm-examples, llama3/README.md (jax 0.6.0)",
        note="theirs has an int8 cache, of which it reads what is filled; ours a full one of bfloat16",
    ),
    Published(
        name="70b-batch128",
        model="llama-3.1-70b",
        tpu="v5e-16",
        mesh="tensor=16",
        batch=128,
        context=2048,
        quantize="int8",
        measure="tokens/s a row",
        value=39.3,
        source="jax-llm-examples, llama3/README.md (jax 0.6.0)",
        note="theirs has an int8 cache, of which it reads what is filled; ours a full one of bfloat16",
    ),
    Published(
        name="8b-v5e8",
        model="llama-3.1-8b",
        tpu="v5e-8",
        mesh="tensor=8",
        batch=128,
        measure="tokens/s",
        value=8249.0,
        source="jetstream-pytorch, benchmarks/summary.md, 2024-04-24",
        note="Llama 3 (the same sizes) served; ShareGPT requests of up to 1024 + 1024 tokens, ours all that long",
    ),
    Published(
        name="qwen3-8b-v6e4",
        model="qwen3-8b",
        tpu="v6e-4",
        mesh="tensor=4",
        batch=64,
        measure="ms a token",
        value=11.11,
        source="sglang-jax 0.1.0, docs/cookbook/autoregressive/Qwen/Qwen3.md",
        note="served: other requests' prefills fall between their tokens",
    ),
    Published(
        name="qwen3-32b-v6e4",
        model="qwen3-32b",
        tpu="v6e-4",
        mesh="tensor=4",
        batch=1,
        prompt=8,
        new=256,
        context=256,
        quantize="int8",
        measure="tokens/s a row",
        value=98.0,
        at_least=True,
        source="sglang-jax, what its end-to-end test of int8 weights asserts",
        note="wall time of a request, the server's own included",
    ),
    Published(
        name="70b-v6e8",
        model="llama-3.1-70b",
        tpu="v6e-8",
        mesh="tensor=8",
        batch=64,
        prompt=1000,
        new=1000,
        measure="tokens/s",
        value=2494.8,
        source="tpu-recipes, inference/trillium/vLLM/Llama3.3/README.md (vLLM nightly of 2025-11-29)",
        note="Llama 3.3 (the same sizes) served",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="names, separated by commas (default: all)")
    parser.add_argument("--arithmetic", action="store_true", help="do not ask the TPU compiler")
    parser.add_argument("--json", help="also write everything to this file")
    args = parser.parse_args()
    wanted = args.case.split(",") if args.case else [c.name for c in CASES]
    if unknown := set(wanted) - {c.name for c in CASES}:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CASES)}")
    rows = []
    print(line(HEAD), flush=True)
    for case in CASES:
        if case.name not in wanted:
            continue
        try:
            rows.append(row(case, False if args.arithmetic else None))
        except JaxinfError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
            return 2
        print(line(cells(rows[-1])), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def row(case: Published, compiled: bool | None) -> dict[str, Any]:
    """The three columns of a case, in its unit."""
    made = plan(case, compiled)
    d, p = made.decode, made.prefill
    ours = value(case, d.step_seconds, p.seconds)
    roofline = value(case, d.terms.roofline, p.terms.roofline)
    slower = ours / case.value if case.measure == "ms a token" else case.value / ours
    return {
        **asdict(case),
        "roofline": roofline,
        "ours": ours,
        "times_published": slower,
        "step_ms": d.step_seconds * 1e3,
        "roofline_step_ms": d.terms.roofline * 1e3,
        "ici_ms": d.terms.ici * 1e3,
        "bound": d.bound,
        "prefill_seconds": p.seconds,
        "witness": d.witness,
        "compiler": made.compiler,
        "notes": list(made.notes),
    }


def plan(case: Published, compiled: bool | None) -> plans.Plan:
    context = case.context or case.prompt + case.new // 2
    asked = plans.Case(
        model=case.model,
        spec=presets.preset(case.model),
        batch=case.batch,
        context=context,
        prompt=min(case.prompt, context),
        quantize=case.quantize,
    )
    return plans.plan(asked, case.tpu, mesh=case.mesh, compiled=compiled)


def value(case: Published, step: float, prefill: float) -> float:
    """What a step and a prefill come to in the case's unit."""
    if case.measure == "ms a token":
        return step * 1e3
    if case.measure == "tokens/s a row":
        return 1 / step
    return case.batch * case.new / (prefill + case.new * step)


HEAD = ("case", "measure", "roofline", "ours", "published", "slower", "step ms", "ICI ms", "bound", "witness")
WIDTHS = (16, 16, 10, 10, 10, 8, 10, 8, 18, 10)


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    least = ">= " if found["at_least"] else ""
    witness = "arithmetic" if found["compiler"] is None else "static"
    figures = [f"{found[name]:,.1f}" for name in ("roofline", "ours")]
    times = f"{found['times_published']:.2f}x"
    step = (f"{found['step_ms']:.2f}", f"{found['ici_ms']:.2f}", found["bound"], witness)
    return (found["name"], found["measure"], *figures, f"{least}{found['value']:,.1f}", times, *step)


def line(values: tuple[str, ...]) -> str:
    return "  ".join(v.ljust(w) for v, w in zip(values, WIDTHS, strict=True)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
