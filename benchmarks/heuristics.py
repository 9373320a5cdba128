"""How far the heuristics for block sizes are from a search: named shapes and random ones.

    python benchmarks/heuristics.py --chip v6e [--op flash_attention] [--random 20] [--named 5]      (extra: tpu)

For each shape: the time with the heuristic's block sizes, the best time that a search finds, and their ratio, which
is to stay at or below 1.15. Exit code 1 if it does not, or a shape could not be timed. The random shapes are drawn
with a seed (--seed), around those of models. Times are the static model's; a shape takes a minute and more. With
--json rows are added to a file as they come: those of the same chip, op and case are replaced.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxinf.aot import Job, case_job, cases, compiler, tuning  # noqa: E402
from jaxinf.aot.jobs import Pool  # noqa: E402
from pallas_kernels.errors import JaxinfError, UnsupportedError  # noqa: E402
from pallas_kernels.named import Call  # noqa: E402

LIMIT = 1.15
# Bytes of arguments: they fit the HBM of every chip, and results beside them.
MOST = 12 << 30


def random_case(op: str, seed: int) -> Any:
    """A case like a named one, of other sizes."""
    random = np.random.default_rng([seed, *op.encode()])
    while True:
        case = _drawn(op, seed, random)
        arrays = jax.tree.leaves(case.call("pallas").args)
        if sum(a.size * a.dtype.itemsize for a in arrays) <= MOST:
            return case


def _drawn(op: str, seed: int, random: np.random.Generator) -> Any:
    names = list(cases.models(op))
    case = cases.find(op, names[random.integers(len(names))])

    def near(value: int, step: int) -> int:
        """Between half and twice the value, a multiple of step."""
        return max(step, int(value * 2.0 ** random.uniform(-1, 1)) // step * step)

    changes: dict[str, Any] = {"name": f"random-{seed}"}
    if op == "flash_attention":
        tokens = near(min(case.queries, 8192), 8)
        changes |= {"queries": tokens, "keys": tokens}
    elif op in ("flash_decode", "cache_append"):
        changes["batch"] = near(min(case.batch, 64), 1)
        slots = near(case.slots, 128)
        changes["slots"] = slots
        if getattr(case, "lengths", ()):
            changes["lengths"] = tuple(int(n) for n in random.integers(slots // 2, slots + 1, changes["batch"]))
    elif op == "grouped_matmul":
        inner, columns = near(case.inner, 128), near(case.columns, 128)
        sizes = tuple(int(n) for n in random.multinomial(case.rows, random.dirichlet(np.ones(len(case.sizes)))))
        changes |= {"inner": inner, "columns": columns, "sizes": sizes}
        if case.scales > 1:
            changes["scales"] = inner // 128
    elif op == "quantized_matmul":
        changes |= {"lead": (near(case.lead[0], 1),), "columns": near(case.columns, 128)}
    elif op == "streamed_matmul":
        columns = tuple(near(n, 128) for n in case.columns)
        changes |= {"rows": min(near(case.rows, 1), 256), "columns": columns}
    else:
        kept = sorted(random.permutation(len(case.rows))[: near(len(case.rows), 1)])
        changes["rows"] = tuple(case.rows[i] for i in kept)
    known = {field.name for field in dataclasses.fields(case)}
    return dataclasses.replace(case, **{name: value for name, value in changes.items() if name in known})


def call(op: str, seed: int, blocks: dict[str, Any] | None = None) -> Call:
    """A random case's call: what jobs of random cases name."""
    chosen = None if blocks is None else cases.blocks_of(op).Blocks(**blocks)
    return random_case(op, seed).call("pallas", blocks=chosen)


def searched() -> list[str]:
    """Ops that have block sizes to choose."""
    found = []
    for op in cases.ops():
        with contextlib.suppress(UnsupportedError):
            cases.blocks_of(op)
            found.append(op)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v6e")
    parser.add_argument("--op", help="ops, separated by commas (default: all)")
    parser.add_argument("--random", type=int, default=20, help="random shapes in all (default: 20)")
    parser.add_argument("--named", type=int, default=5, help="named shapes of each op (default: 5)")
    parser.add_argument("--budget", type=int, default=40, help="block sizes to compile for a shape (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="also write the table to this file")
    args = parser.parse_args(argv)
    ops = args.op.split(",") if args.op else searched()
    shapes = []
    for op in ops:
        names = list(cases.models(op))
        shapes += [(op, names[i * len(names) // args.named], None) for i in range(min(args.named, len(names)))]
    shapes += [(ops[i % len(ops)], f"random-{args.seed + i}", args.seed + i) for i in range(args.random)]
    print(f"{args.chip}, {compiler()}: time of the heuristic over the best of {args.budget}\n", flush=True)
    lines = []
    with Pool(args.chip, workers=args.workers, paths=[HERE]) as pool:
        for op, name, seed in shapes:
            try:
                lines.append(compare(op, name, seed, args.chip, args.budget, pool))
            except JaxinfError as error:
                lines.append({"op": op, "case": name, "error": str(error)})
            print("  ".join(f"{k}={v}" for k, v in lines[-1].items()), flush=True)
            if args.json:
                keep(Path(args.json), args.chip, lines[-1])
    ratios = [line["ratio"] for line in lines if line.get("ratio")]
    print(
        f"\n{len(ratios)} shapes, worst {max(ratios, default=0):.3f}, "
        f"{sum(r > LIMIT for r in ratios)} above {LIMIT}"
    )
    return int(len(ratios) < len(lines) or max(ratios, default=LIMIT) > LIMIT)


def keep(path: Path, chip: str, line: dict[str, Any]) -> None:
    """Puts a row into the file, in place of what is there of the same chip, op and case."""
    table = json.loads(path.read_text()) if path.exists() else {}
    rows = table.setdefault(chip, {}).setdefault("rows", [])
    table[chip]["compiler"] = compiler()
    same = [i for i, row in enumerate(rows) if (row["op"], row["case"]) == (line["op"], line["case"])]
    rows[same[0] if same else len(rows) : same[0] + 1 if same else len(rows)] = [line]
    path.write_text(json.dumps(table, indent=1) + "\n")


def compare(op: str, name: str, seed: int | None, chip: str, budget: int, pool: Pool) -> dict[str, Any]:
    """A row of the table; `seed` draws a random case, else `name` is that of a case."""

    def job(blocks: tuning.Blocks) -> Job:
        if seed is None:
            return case_job(op, name, blocks=blocks)
        return Job("heuristics:call", {"op": op, "seed": seed, "blocks": dict(blocks)})

    shown = cases.call(op, name) if seed is None else call(op, seed)
    found = tuning.search(op, name, shown, job, chip, budget=budget, pool=pool)
    mine, best = found.heuristic_seconds, found.best
    fastest = min((t.seconds for t in found.trials if t.seconds is not None), default=None)
    line: dict[str, Any] = {"op": op, "case": name, "bucket": found.bucket}
    if mine is None or fastest is None or best is None:
        return line | {"error": found.trials[-1].error if found.trials else "no candidates"}
    return line | {
        "ms": round(mine * 1e3, 5),
        "best_ms": round(fastest * 1e3, 5),
        "ratio": round(mine / fastest, 3),
        "tried": len(found.trials),
        "heuristic": dict(found.heuristic),
        "best": dict(best.blocks),
    }


if __name__ == "__main__":
    sys.exit(main())
