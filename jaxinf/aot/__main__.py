"""`python -m jaxinf.aot`: the static model of one function or named case, with its loops and regions."""

import argparse
import json
import sys

from jaxinf.aot import Job, Report, case_job, run
from jaxinf.core.record import to_record
from pallas_kernels.chips import MIB
from pallas_kernels.errors import JaxinfError

EXAMPLES = """\
examples:
  python -m jaxinf.aot flash_attention/llama3-8b-prefill-4k --chip v5e,v6e --regions
  python -m jaxinf.aot flash_attention/llama3-8b-prefill-4k --arguments '{"blocks": {"q": 512, "kv": 1024}}'
  python -m jaxinf.aot kernels.py:attention --arguments '[{"bq": 512}, {"bq": 1024}]'

A function gives a pallas_kernels.named.Call, (fn, args) or (fn, args, Work). Times are modelled, not measured.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxinf.aot",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", help="OP/CASE, module:function or file.py:function")
    parser.add_argument("--chip", default="v5e", help="chips or slices (v5e:4x4), separated by commas")
    parser.add_argument("--arguments", default="{}", help="JSON keyword arguments, or a list of them: several jobs")
    parser.add_argument("--implementation", default="pallas", help="of an op's case (default: pallas)")
    parser.add_argument("--regions", action="store_true", help="print loops, regions and spans")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", help="keep the compiler's dumps in this folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    given = json.loads(args.arguments)
    given = given if isinstance(given, list) else [given]
    documents = []
    for chip in args.chip.split(","):
        keep = args.keep and f"{args.keep}/{chip}"
        try:
            jobs = [_job(args.program, args.implementation, each) for each in given]
            for outcome in run(jobs, chip, workers=args.workers, keep=keep):
                if args.json:
                    document = {"chip": chip, "arguments": dict(outcome.job.arguments), "error": outcome.error}
                    documents.append(document | {"report": outcome.report and to_record(outcome.report)})
                elif outcome.report is None:
                    print(f"{chip} {dict(outcome.job.arguments)}: {outcome.kind}: {outcome.error}")
                else:
                    print(f"{chip} {dict(outcome.job.arguments)}")
                    print(text(outcome.report, args.regions), flush=True)
        except JaxinfError as error:
            print(error, file=sys.stderr)
            return 2
    if args.json:
        print(json.dumps(documents, indent=2))
    return 0


def _job(program: str, implementation: str, arguments: dict) -> Job:
    if ":" in program:
        return Job(program, arguments)
    op, _, case = program.partition("/")
    return case_job(op, case, implementation, arguments.get("blocks"))


def text(report: Report, regions: bool = False) -> str:
    """A few lines for people."""
    estimate = report.estimate
    assert estimate is not None
    lines = [
        f"  {estimate.seconds * 1e3:.3f} ms (issue {estimate.issue_seconds * 1e3:.3f}), roofline "
        f"{estimate.flop_seconds * 1e3:.3f} (FLOP), {estimate.byte_seconds * 1e3:.3f} (HBM): x{estimate.ratio:.2f}"
        f", bound by {estimate.bound}",
        f"  HBM {(estimate.read + estimate.written) / 1e6:.1f} MB in {estimate.copies} copies of "
        f"{estimate.copy_bytes / 1024:.0f} KiB; VMEM {estimate.vmem / MIB:.1f} MiB; temporaries "
        f"{report.memory.temporaries / MIB:.1f} MiB; compiled in {report.compile_seconds:.1f} s",
    ]
    lines += [f"  SUSPECT: {why}" for why in estimate.suspect]
    lines += [f"  {c.kind} of {c.chips}: {c.bytes:,} bytes x {c.times}" for c in report.collectives]
    total = sum(o.time for o in estimate.operations)
    for o in sorted(estimate.operations, key=lambda o: -o.time):
        if o.time < 0.01 * total:
            continue
        lines.append(
            f"  {'kernel' if o.kernel else 'XLA'} {o.name}: {o.bundles} bundles; {o.cycles:,} cycles, {o.time:,.0f}"
            f" in all; {o.steps} steps; read {o.read / 1e6:.1f} MB, written {o.written / 1e6:.1f} MB; {o.copies}"
            f" copies in {o.pieces} pieces; MXU given {2e-9 * o.macs:.1f} GFLOP"
            + (f"; {o.unknown_branches} unknown branches" if o.unknown_branches else "")
        )
        for s in o.spans[: None if regions else 1]:
            units = " ".join(f"{name} {share:.0%}" for name, share in vars(s.units).items())
            lines.append(
                f"    span [{s.start:#x},{s.end:#x}) x {s.count} = {s.share:.0%}: {units}; empty {s.empty:.0%}; "
                f"spills {s.spills}, fills {s.fills}; bound by {s.bound}"
            )
        if regions:
            for l in o.loops:
                lines.append(f"    loop [{l.start:#x},{l.end:#x}) x {l.trips:.4g}{'' if l.known else ' (unknown)'}")
            for r in o.regions:
                ran = (
                    "never reached"
                    if r.fraction is None
                    else f"run {r.fraction:.4f}{'' if r.known else ' (assumed)'}"
                )
                lines.append(f"    region {r.number} [{r.start:#x},{r.end:#x}) reached {r.reached}, {ran}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
