"""`jaxinf tune`: searches a kernel's block sizes through the TPU compiler."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from jaxinf.cli import output
from jaxinf.cli.options import add_json, count

if TYPE_CHECKING:
    from jaxinf.aot.tuning import Search

EPILOG = """\
examples:
  jaxinf tune flash_attention --chip v6e --case llama3-8b-prefill-4k
  jaxinf tune grouped_matmul --chip v5e --case even-8-of-4096 --budget 100 --workers 2 --json
  jaxinf tune flash_decode --chip v6e --all-cases --write

No TPU is needed, but libtpu is (`pip install "jaxinf[tpu]"`, Linux): times are those of the compiler's schedule in
a static model, no measurements. Times within 3 % count as equal, and the choice that takes less VMEM wins. What is
found is used once it is in the op's table (--write), for all calls in the same bucket of shapes; where the built-in
choice is as fast, no entry is needed and none is written.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("op", metavar="OP", help="a kernel, such as flash_attention")
    parser.add_argument("--chip", default="v5e", help="v5e, v6e, v5p, 7x (default: v5e)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--case", metavar="NAME", help="a named case, such as llama3-8b-prefill-4k")
    which.add_argument("--all-cases", action="store_true", help="one case of every bucket of shapes")
    parser.add_argument(
        "--budget", type=count, default=60, metavar="N", help="block sizes to compile for a case (default: 60)"
    )
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="compilers at a time (default: 1)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--write", action="store_true", help="put the best into the table that ships with the op, if that pays"
    )
    where.add_argument("--output", metavar="FILE", help="put the best into this table")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the chip is only described, also where there is one
    from jaxinf.aot import cases, topology, tuning

    cases.blocks_of(args.op)
    names = [args.case]
    if args.case is not None:
        cases.find(args.op, args.case)
    topology.devices(args.chip)
    if args.all_cases:
        names = list(tuning.buckets(args.op, args.chip, cases.models(args.op)).values())
    target = args.output or (tuning.shipped_table(args.op) if args.write else None)
    searches = []
    for name in names:
        with output.progress(f"{args.op} {name}", "block sizes") as progress:
            found = tuning.tune(
                args.op, name, args.chip, budget=args.budget, workers=args.workers, progress=progress
            )
        searches.append(found)
        if not args.json:
            print(_text(found))
        if args.write and found.best is not None and not found.pays:
            output.note("not written: the built-in choice is as fast")
        elif target is not None and found.best is not None:
            tuning.write(target, [found])
            output.note(f"written to {target}")
    if args.json:
        output.print_json([_document(found) for found in searches])
    return 0 if all(found.best for found in searches) else 1


def _text(found: Search) -> str:
    lines = [
        f"{found.op} {found.case} on {found.chip} ({found.compiler}), bucket {found.bucket!r}",
        f"{len(found.trials)} of {found.candidates} candidates compiled, {len(found.skipped)} skipped: over VMEM\n",
    ]
    timed = [t for t in found.trials if t.seconds is not None]
    names = list(found.heuristic)
    rows = [["ms", "x roofline", "VMEM", "copies", "bound by", *names, ""]]
    for trial in timed:
        mark = "best" if trial is found.best else ""
        mark += " heuristic" if trial.blocks == found.heuristic else ""
        values = [str(trial.blocks[name]) for name in names]
        figures = [f"{(trial.seconds or 0) * 1e3:.4f}", f"{trial.ratio:.2f}", output.size(trial.vmem)]
        rows.append([*figures, str(trial.copies), trial.bound, *values, mark.strip()])
    lines.append(output.table(rows, header=True))
    for trial in found.trials:
        if trial.seconds is None:
            lines.append(f"no time for {_blocks(trial.blocks)}: {trial.error}")
    for trial in sorted(found.skipped, key=lambda t: t.vmem)[:5]:
        lines.append(f"skipped {_blocks(trial.blocks)}: {output.size(trial.vmem)} of VMEM")
    if len(found.skipped) > 5:
        lines.append(f"skipped {len(found.skipped) - 5} more that need more VMEM yet")
    best, heuristic = found.best, found.heuristic_seconds
    if best and best.seconds and heuristic:
        lines.append(f"\nheuristic / best: {heuristic / best.seconds:.3f}")
    return "\n".join(lines) + "\n"


def _blocks(blocks: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in blocks.items())


def _document(found: Search) -> dict[str, Any]:
    def trial(t: Any) -> dict[str, Any]:
        return dict(vars(t)) | {"blocks": dict(t.blocks)}

    return {
        "op": found.op,
        "case": found.case,
        "chip": found.chip,
        "bucket": found.bucket,
        "compiler": found.compiler,
        "candidates": found.candidates,
        "heuristic": dict(found.heuristic),
        "heuristic_seconds": found.heuristic_seconds,
        "best": trial(found.best) if found.best else None,
        "trials": [trial(t) for t in found.trials],
        "skipped": [trial(t) for t in found.skipped],
    }
