"""The kernels beside JAX's own, by the static model of the TPU compiler's schedules, in one run.

    python benchmarks/kernels.py --chip v5e,v6e                         (extra: tpu)
    python benchmarks/kernels.py --chip v6e --op flash_attention --case 'gemma3-12b-*'
    python benchmarks/kernels.py --chip v5e,v6e --workers 2 --json benchmarks/results/kernels.json

Without --op and --case: the cases of the table of goals (benchmarks/reach.py), which is printed at the end, and one
case of each other op. Columns: time, roofline (the least that FLOP and HBM bytes take), time / roofline, what
bounds it, HBM copies and bytes a copy, then the best of JAX's kernels at the block sizes of benchmarks/kernel_peers
and how many times faster ours is.

No TPU is used: times are modelled (docs/kernels.md says how far to trust them). The model gives each copy peak
bandwidth at no cost, so two kernels of equal time are told apart by their copies.
"""

import argparse
import fnmatch
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kernel_peers  # noqa: E402
from reach import GOALS, Goal  # noqa: E402

from jaxinf.aot import Job, Outcome, case_job, cases, compiler, run  # noqa: E402
from jaxinf.aot.static import row  # noqa: E402
from pallas_kernels.errors import JaxinfError  # noqa: E402

Key = tuple[str, str]  # op, case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e,v6e", help="chips, separated by commas (default: v5e,v6e)")
    parser.add_argument("--op", help="ops, separated by commas")
    parser.add_argument("--case", help="a pattern of case names, such as 'llama3-8b-*'")
    parser.add_argument("--workers", type=int, default=1, help="compilers at a time (default: 1)")
    parser.add_argument("--no-peers", action="store_true", help="leave JAX's kernels out")
    parser.add_argument("--json", help="also write everything to this file")
    args = parser.parse_args()
    try:
        keys = chosen(args.op, args.case)
        results = {chip: measure(keys, chip, args.workers, not args.no_peers) for chip in args.chip.split(",")}
    except JaxinfError as error:
        print(error, file=sys.stderr)
        return 2
    reached = [line for chip, found in results.items() for line in goals(chip, found)]
    if reached:
        print(f"\n{compiler()}: goals and what is reached\n")
        print(table([list(map(str, line.values())) for line in reached], list(reached[0])))
    if args.json:
        document = {
            "compiler": compiler(),
            "jax": version("jax"),
            "rows": [r for found in results.values() for r in found.values()],
            "goals": reached,
        }
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


def chosen(ops: str | None, pattern: str | None) -> list[Key]:
    """The cases that were asked for."""
    if ops is None and pattern is None:
        keys = [key for goal in GOALS for key in needed(goal)]
        told = {op for op, _ in keys}
        keys += [(op, next(iter(cases.models(op)))) for op in cases.ops() if op not in told]
        return list(dict.fromkeys(key for key in keys if key[0] in cases.ops()))
    names = cases.ops() if ops is None else ops.split(",")
    return [(op, name) for op in names for name in cases.models(op) if fnmatch.fnmatch(name, pattern or "*")]


def needed(goal: Goal) -> list[Key]:
    return [(goal.op, goal.case), *([(goal.op, goal.against)] if goal.against else [])]


def measure(keys: list[Key], chip: str, workers: int, peers: bool) -> dict[Key, dict[str, Any]]:
    """Models ours and JAX's on one chip, printing each case as it is done."""
    jobs: dict[int, tuple[Key, str]] = {}
    todo: list[Job] = []
    waits: dict[Key, int] = {}
    for op, case in keys:
        mine = [("", case_job(op, case))]
        if peers:
            mine += [
                (name, Job("kernel_peers:call", {"op": op, "case": case, "name": name}))
                for name in kernel_peers.of(op, case)
            ]
        waits[op, case] = len(mine)
        for name, job in mine:
            jobs[id(job)] = ((op, case), name)
            todo.append(job)
    print(f"\n{chip}, {compiler()}\n")
    widths = [56, 9, 9, 7, 26, 15, 34, 9, 7]
    head = ["op/case", "ms", "roofline", "ratio", "bound by", "copies of KiB", "JAX's best", "ms", "faster"]
    print(line(head, widths), flush=True)
    found: dict[Key, dict[str, Any]] = {
        key: {"op": key[0], "case": key[1], "chip": chip, "peers": []} for key in keys
    }
    for outcome in run(todo, chip, workers=workers, paths=[HERE]):
        key, name = jobs[id(outcome.job)]
        record(found[key], name, outcome)
        waits[key] -= 1
        if not waits[key]:
            print(line(cells(found[key]), widths), flush=True)
    return found


def record(entry: dict[str, Any], name: str, outcome: Outcome) -> None:
    if outcome.report is None or outcome.report.estimate is None:
        result: dict[str, Any] = {"error": outcome.error}
    else:
        result = row(outcome.report.estimate) | {"temporaries": outcome.report.memory.temporaries}
    if name:
        entry["peers"].append({"name": name} | result)
    else:
        entry |= result


def best_peer(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest of JAX's kernels whose time is to be believed."""
    return min((p for p in entry["peers"] if "ms" in p and not p["suspect"]), key=lambda p: p["ms"], default=None)


def cells(entry: dict[str, Any]) -> list[str]:
    name = f"{entry['op']}/{entry['case']}"
    if "error" in entry:
        return [name, "-", "", "", entry["error"][:100]]
    suspect = " ?" if entry["suspect"] else ""
    copies = f"{entry['copies']} of {entry['copy_bytes'] / 1024:.0f}"
    values = [name, f"{entry['ms']:.4f}", f"{entry['roofline_ms']:.4f}", f"{entry['ratio']:.2f}{suspect}"]
    values += [entry["bound"], copies]
    peer = best_peer(entry)
    if peer is None:
        return [*values, "none" if not entry["peers"] else "none compiles", "", ""]
    return [*values, peer["name"], f"{peer['ms']:.4f}", f"{peer['ms'] / entry['ms']:.2f}x"]


def goals(chip: str, found: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the table of goals that this run has figures for."""
    lines = []
    for goal in GOALS:
        if chip not in goal.goals or any(key not in found for key in needed(goal)):
            continue
        value = figure(goal, found)
        limit = goal.goals[chip]
        reached = value is not None and (value >= limit if goal.at_least else value <= limit)
        lines.append(
            {
                "chip": chip,
                "what": f"{goal.op}: {goal.label}",
                "goal": f"{'>=' if goal.at_least else '<='} {limit:g}",
                "reached": "-" if value is None else f"{value:.3f}",
                "measure": goal.measure + (f" {goal.against}" if goal.against else ""),
                "ok": "-" if value is None else "yes" if reached else "NO",
                "bound by": found[goal.op, goal.case].get("bound", found[goal.op, goal.case].get("error", ""))[:60],
            }
        )
    return lines


def figure(goal: Goal, found: dict[Key, dict[str, Any]]) -> float | None:
    """What a goal compares; None where a side of it is missing or not to be believed."""
    ours = found[goal.op, goal.case]
    if "ms" not in ours or ours["suspect"]:
        return None
    if goal.measure == "times the roofline":
        return ours["ratio"]
    if goal.measure == "times faster than":
        other = found[goal.op, goal.against]
        return other["ms"] / ours["ms"] if "ms" in other else None
    peer = best_peer(ours)
    if peer is None:
        return None
    if goal.measure == "times faster than JAX's":
        return peer["ms"] / ours["ms"]
    return peer["copy_bytes"] / ours["copy_bytes"]


def line(values: list[str], widths: list[int]) -> str:
    return "  ".join(v.ljust(w) for v, w in zip(values, widths[: len(values)], strict=True)).rstrip()


def table(rows: list[list[str]], head: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(line(values, widths) for values in [head, ["-" * w for w in widths], *rows])


if __name__ == "__main__":
    sys.exit(main())
