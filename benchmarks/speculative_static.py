"""The speculative loop of a pair of published sizes, compiled ahead of time for TPUs that are not here.

    python benchmarks/speculative_static.py [--json out.json]      (extra: tpu; minutes)

By default Llama-3.1-70B with int8 weights, drafted for by Llama-3.1-8B, on a v5e-16. The whole loop is compiled for
its memory; a decode step of the target, its pass over a draft, and a decode step of the draft model are compiled
for their times by a static model of the schedule. From these, the speed-up over plain decoding for g drafted
tokens of which each is accepted with probability a (Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8):

    (1 - a^(g+1)) / (1 - a) / (verify + g draft)      both in plain steps of the target

Nothing here has run on a TPU.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxinf.aot import jobs, slices, speculating
from jaxinf.aot.job import Job
from jaxinf.core import to_record
from jaxinf.models import presets

ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)


def step(model: str, part: str, args: argparse.Namespace, quantize: str | None, tokens: int = 1) -> Job:
    where = slices.find(args.tpu)
    arguments = dict(
        spec=to_record(presets.preset(model)),
        chip=where.topology,
        mesh=args.mesh,
        part=part,
        batch=args.batch,
        prompt=tokens,
        capacity=args.context,
        quantize=quantize,
        held=args.context - tokens,
    )
    return Job("jaxinf.aot.plan.compiling:program", arguments, "program")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="llama-3.1-70b")
    parser.add_argument("--draft", default="llama-3.1-8b")
    parser.add_argument("--tpu", default="v5e-16")
    parser.add_argument("--mesh", default="tensor=16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--quantize", default="int8", help="of the target; none: bfloat16")
    parser.add_argument("--quantize-draft", default="int8", help="of the draft model; none: bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    large, small = (None if q == "none" else q for q in (args.quantize, args.quantize_draft))
    where = slices.find(args.tpu)

    sizes: dict[str, Any] = dict(draft_tokens=args.draft_tokens, batch=args.batch, capacity=args.context)
    sizes |= dict(chip=where.topology, mesh=args.mesh, quantize=large, quantize_draft=small)
    pair = speculating.speculation(args.target, args.draft, **sizes)
    specs = dict(target=to_record(presets.preset(args.target)), draft=to_record(presets.preset(args.draft)))
    todo = {
        "loop": Job("jaxinf.aot.speculating:loop", specs | sizes, "none"),
        "target": step(args.target, "decode", args, large),
        "verify": step(args.target, "verify", args, large, args.draft_tokens + 1),
        "draft": step(args.draft, "decode", args, small),
    }
    done = {id(o.job): o for o in jobs.run(list(todo.values()), where.topology, timeout=1800)}
    reports = {}
    for name, job in todo.items():
        outcome = done[id(job)]
        if outcome.report is None:
            raise SystemExit(f"{name}: {outcome.error}")
        reports[name] = outcome.report
    seconds = {name: r.timeline.seconds for name, r in reports.items() if r.timeline is not None}
    memory = reports["loop"].memory

    def gib(count: float) -> str:
        return f"{count / 2**30:.2f} GiB"

    print(
        f"{args.target} ({args.quantize}) drafted for by {args.draft} ({args.quantize_draft}), {args.tpu}, "
        f"{args.mesh}, batch {args.batch}, context {args.context}; static analysis, {reports['loop'].compiler}"
    )
    weights, caches = (" + ".join(map(gib, pair)) for pair in (pair.weights, pair.cache))
    print(
        f"HBM a chip: {gib(memory.peak)}: weights {weights}, caches {caches}, {gib(memory.temporaries)} temporary"
    )
    for name, label in (("target", "decode step of the target"), ("verify", "its pass over a draft")):
        print(f"{label}: {1e3 * seconds[name]:.2f} ms")
    print(f"decode step of the draft model: {1e3 * seconds['draft']:.2f} ms")
    verify, draft = seconds["verify"] / seconds["target"], seconds["draft"] / seconds["target"]
    gains: dict[str, dict[int, float]] = {}
    print("speed-up by acceptance and drafted tokens:")
    print("  a     " + "".join(f"{g:>8d}" for g in range(1, args.draft_tokens + 1)))
    for a in ACCEPTANCE:
        gains[str(a)] = {
            g: (1 - a ** (g + 1)) / (1 - a) / (verify + g * draft) for g in range(1, args.draft_tokens + 1)
        }
        print(f"  {a:.1f}   " + "".join(f"{x:7.2f}x" for x in gains[str(a)].values()))
    if args.json:
        record = dict(
            vars(args) | {"json": None},
            compiler=reports["loop"].compiler,
            seconds=seconds,
            memory=dataclasses.asdict(memory),
            weights=pair.weights,
            cache=pair.cache,
            gains=gains,
        )
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
