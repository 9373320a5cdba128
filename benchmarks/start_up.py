"""From a new process to the first answer: what saved programs save, on the device at hand.

    python benchmarks/start_up.py [--model stdlib] [--rounds 3] [--json out.json]

Each start is a process of its own, which loads the model and generates 64 tokens from a prompt of 4:
  cold       traces and compiles
  cache      traces, and finds what it compiles in JAX's compilation cache
  programs   finds its programs in a folder that `jaxinf compile` wrote: neither traces nor compiles them
The rounds go through the three in turn, so that a slow minute of the machine meets all alike; the table has the
medians. `ready` is from the start of the process to the model loaded, `answer` from there to the 64 tokens, `again`
the same call once more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("cold", "cache", "programs")

START = """
import json, sys, time
began = float(sys.argv[1])
from jaxinf import LM
lm = LM.from_pretrained(sys.argv[2], programs=sys.argv[3] or None)
loaded = time.time()
tokens = lm.generate([5, 6, 7, 8], 64, eos=()).tokens
answered = time.time()
lm.generate([5, 6, 7, 8], 64, eos=())
print(json.dumps({"ready": loaded - began, "answer": answered - loaded, "again": time.time() - answered,
    "tokens": tokens}))
"""


def start(model: str, way: str, folder: Path) -> dict:
    """One start. With saved programs a warning, which says that they are not used, is an error."""
    import time

    env = dict(os.environ, PYTHONPATH=str(ROOT), JAXINF_COMPILATION_CACHE="0")
    if way == "cache":
        env["JAXINF_COMPILATION_CACHE"] = str(folder / "cache")
    programs = str(folder / "programs") if way == "programs" else ""
    strict = ["-W", "error::UserWarning"] if way == "programs" else []
    command = [sys.executable, *strict, "-c", START, str(time.time()), model, programs]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def device() -> str:
    import jax

    kind = jax.devices()[0].device_kind
    return f"{kind} ({os.cpu_count()} cores)" if kind == "cpu" else kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stdlib", help="embedded model or folder (default: stdlib)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "jaxinf", "compile", args.model, str(folder / "programs"), "--prompt", "4"]
        env = dict(os.environ, PYTHONPATH=str(ROOT), JAXINF_COMPILATION_CACHE="0")
        subprocess.run([*command, "--new", "64"], env=env, check=True, stdout=subprocess.DEVNULL)
        start(args.model, "cache", folder)  # fills it
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                found[way].append(start(args.model, way, folder))
        size = sum(path.stat().st_size for path in (folder / "programs").iterdir())
    if len({tuple(one["tokens"]) for some in found.values() for one in some}) != 1:
        raise SystemExit("the ways give different tokens")

    rows = {
        way: {part: statistics.median(one[part] for one in some) for part in ("ready", "answer", "again")}
        for way, some in found.items()
    }
    print(f"{args.model} on {device()}, load {os.getloadavg()[0]:.1f}, medians of {args.rounds}; ", end="")
    print(f"programs: {size / 1e6:.1f} MB")
    print(f"{'':10}{'ready':>9}{'answer':>9}{'again':>9}{'answer is':>12}")
    for way, row in rows.items():
        gain = rows["cold"]["answer"] / row["answer"]
        print(f"{way:10}{row['ready']:8.2f}s{row['answer']:8.2f}s{row['again']:8.3f}s{gain:10.1f}x sooner")
    if args.json:
        report = {"model": args.model, "device": device(), "load": os.getloadavg(), "bytes": size}
        Path(args.json).write_text(json.dumps(report | {"medians": rows, "starts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
