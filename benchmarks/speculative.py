"""Speculative decoding on held-out Python files: what each drafter saves, beside plain decoding in the same run.

    python benchmarks/speculative.py [--json out.json] [--plot out.png]               (extra: bench; half an hour)
    python benchmarks/speculative.py --drafters ngram,stdlib-draft --prompts 8 --no-peer   (a quick look)
    python benchmarks/speculative.py --widen 32768                                    (a target larger than caches)

Each prompt is a piece of a held-out file; the embedded target (its float originals, in `--dtype`) continues it
greedily and at temperature 1. By drafter:
  tokens/pass  new tokens for each pass of the target after the first, drafting in full at every pass
  accepted     share of drafted tokens that stood at the first, second, ... place, of those before which all stood
  faster       decoding time (after the first token) of plain decoding over that with the drafter as `with_drafter`
               makes it, adaptive: medians over rounds that go through all drafters in turn; batch 1 and `--batch`
Continuations that loop (distinct 4-grams below half of all) are left out and counted: any drafter predicts a loop.

Rows of transformers: the same pair, exported to Hugging Face folders whose logits are compared first; its assisted
and prompt-lookup generation beside its own plain generation.

The embedded target is so small that it lies in a processor's caches: arithmetic and the number of operations bound
its passes, and one over five tokens takes as long as three. With `--widen` its dense feed-forward layers get
hidden channels that add nothing (`widening.py`): the same tokens, from weights that come from memory, which then
bounds a pass, as it does for models that people use.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import speculative_peers
import widening

import jaxinf
from jaxinf.generation import speculative
from jaxinf.lm import drafting
from jaxinf.training.corpus import read_held_out, read_part

DATA = Path(__file__).parents[1] / "tests" / "data"
LOOP = 0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """A drafter, given the target; `tree`: of trees."""

    label: str
    make: Callable[[jaxinf.LM], Any]
    tree: bool = False


def draft_model(name: str, tokens: int) -> Callable[[jaxinf.LM], Any]:
    def make(target: jaxinf.LM) -> Any:
        folder = DATA / "bfloat16" / name
        small = jaxinf.LM.from_pretrained(folder if folder.is_dir() else name, dtype=str(target.model.dtype))
        return speculative.DraftModel(small.model, tokens=tokens, limit=small.context)

    return make


def draft_tree(target: jaxinf.LM) -> Any:
    small = jaxinf.LM.from_pretrained(DATA / "bfloat16" / "stdlib-draft", dtype=str(target.model.dtype))
    return speculative.DraftTree(small.model, branches=(3, 1, 1, 1), limit=small.context)


def big_little(target: jaxinf.LM) -> Any:
    small = jaxinf.LM.from_pretrained(DATA / "bfloat16" / "stdlib-draft", dtype=str(target.model.dtype))
    return speculative.BigLittle(small.model, limit=small.context)


@functools.cache
def training_files() -> tuple[bytes, ...]:
    """Every fourth file of the training part."""
    return tuple(read_part("train").values())[::4]


def retrieval(target: jaxinf.LM) -> Any:
    assert target.tokenizer is not None
    texts = [target.tokenizer.encode(data.decode()) for data in training_files()]
    return speculative.Retrieval.of(speculative.Datastore.build(texts, target.spec.vocab))


def skipping(target: jaxinf.LM) -> Any:
    assert target.tokenizer is not None
    texts = (target.tokenizer.encode(data.decode()) for data in training_files()[:64])
    rows = [ids[:256] for ids in texts if len(ids) >= 256][:8]
    found = speculative.find_skips(target.model, rows)
    if not found.layers:
        note("no set of layers is worth leaving out; the default one is taken")
        return speculative.SelfSpeculative.of(target.model)
    return speculative.SelfSpeculative(found.layers, tokens=found.tokens)


def heads(name: str, **options: Any) -> Callable[[jaxinf.LM], Any]:
    """The heads that ship with the target."""

    def make(target: jaxinf.LM) -> Any:
        return drafting.heads(name, target.model, **options)

    return make


ROWS = [
    Row("ngram", lambda target: speculative.PromptLookup(tokens=7)),
    Row("lookahead", lambda target: speculative.Lookahead()),
    Row("retrieval", retrieval, tree=True),
    Row("self", skipping),
    Row("stdlib-draft", draft_model("stdlib-draft", 4)),
    Row("stdlib-draft-aligned", draft_model("stdlib-draft-aligned", 4)),
    Row("stdlib-draft tree", draft_tree, tree=True),
    Row("medusa", heads("medusa"), tree=True),
    Row("medusa chain", heads("medusa-chain")),
    Row("eagle", heads("eagle-tree"), tree=True),
    Row("eagle chain", heads("eagle")),
    Row("BigLittle", big_little),
]


def loops(tokens: list[int]) -> bool:
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return bool(grams) and len(set(grams)) / len(grams) < LOOP


def prompts_of(lm: jaxinf.LM, count: int, length: int) -> list[list[int]]:
    """Pieces of `length` tokens, spread evenly over all held-out files."""
    assert lm.tokenizer is not None
    found = []
    for text in read_held_out(DATA / "stdlib_heldout.xz").values():
        ids = lm.tokenizer.encode(text.decode())
        found += [ids[start : start + length] for start in range(length, len(ids) - length, length)]
    return [found[i * len(found) // count] for i in range(min(count, len(found)))]


def decode_seconds(answer: jaxinf.Completion) -> float:
    return answer.stats.seconds - answer.stats.first_token_seconds


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def counted(lm: jaxinf.LM, prompts: list[list[int]], new: int, keep: list[bool], **sampling: Any) -> dict[str, Any]:
    """What drafting in full comes to over the prompts that are kept (all that do not loop, where keep is empty)."""
    written = passes = looped = 0
    offered = accepted = np.zeros(0, int)
    answers = []
    for i in range(0, len(prompts), 8):
        answers += lm.generate(prompts[i : i + 8], new, eos=(), **sampling)
    for i, answer in enumerate(answers):
        if not keep[i] if keep else loops(answer.tokens):
            looped += 1
            continue
        d = answer.stats.drafting
        assert d is not None
        written, passes = written + d.written, passes + d.passes
        if not offered.size:
            offered = accepted = np.zeros(len(d.offered), int)
        offered, accepted = offered + d.offered, accepted + d.accepted
    shares = (accepted / np.maximum(offered, 1)).round(4).tolist()
    return {
        "tokens_per_pass": written / max(passes, 1),
        "acceptance": shares,
        "looped": looped,
        "tokens": [answer.tokens for answer in answers],
    }


def times(lm: jaxinf.LM, prompts: list[list[int]], new: int, batch: int) -> float:
    """Seconds of decoding all prompts, greedy, `batch` at a time."""
    total = 0.0
    for i in range(0, len(prompts) - batch + 1, batch):
        answers = lm.generate(prompts[i : i + batch], new, eos=())
        total += max(decode_seconds(answer) for answer in answers)
    return total


def opened(args: argparse.Namespace, **options: Any) -> tuple[jaxinf.LM, jaxinf.LM]:
    """The model that drafters were made for, and the one that they draft for, of the same function."""
    lm = jaxinf.LM.from_pretrained(args.model, **options)
    return lm, widening.widened(lm, args.widen) if args.widen else lm


def ours(args: argparse.Namespace, source: jaxinf.LM, lm: jaxinf.LM, prompts: list[list[int]]) -> dict[str, Any]:
    rows = [row for row in ROWS if args.drafters is None or row.label in args.drafters]
    plain = [a.tokens for i in range(0, len(prompts), 8) for a in lm.generate(prompts[i : i + 8], args.new, eos=())]
    keep = [not loops(tokens) for tokens in plain]
    kept = [p for p, good in zip(prompts, keep, strict=True) if good]
    note(f"{len(kept)} of {len(prompts)} greedy continuations do not loop")
    adaptive: dict[str, jaxinf.LM] = {}
    found: list[dict[str, Any]] = []
    for row in rows:
        note(row.label)
        drafter = row.make(source)
        if lm is not source and hasattr(drafter, "target"):
            drafter = dataclasses.replace(drafter, target=None)  # a fingerprint, of the other's weights
        full = lm.with_drafter(drafter, adaptive=False)
        greedy = counted(full, prompts, args.new, keep)
        warm = counted(full, prompts, args.new, [], temperature=1.0)
        same = [a == b for a, b in zip(greedy.pop("tokens"), plain, strict=True)]
        assert full.drafter is not None
        found.append(
            {
                "label": row.label,
                "tree": row.tree,
                "exact": full.drafter.exact,
                "drafted": full.drafter.nodes,
                "same": sum(same),
                "greedy": greedy,
                "temperature_1": {k: v for k, v in warm.items() if k != "tokens"},
            }
        )
        if not args.no_speed:
            adaptive[row.label] = lm.with_drafter(drafter)
        jax.clear_caches()
    if not args.no_speed:
        timed = kept[: args.timed]
        for batch in (1, args.batch):
            if len(timed) < batch:
                continue
            ratios: dict[str, list[float]] = {label: [] for label in adaptive}
            for turn in range(args.rounds + 1):
                note(f"batch {batch}, " + (f"round {turn} of {args.rounds}" if turn else "compiling"))
                base = times(lm, timed, args.new, batch)
                for label, drafted in adaptive.items():
                    took = times(drafted, timed, args.new, batch)
                    if turn:
                        ratios[label].append(base / took)
            for made in found:
                made[f"faster_{batch}"] = statistics.median(ratios[made["label"]])
            jax.clear_caches()
    return {"rows": found, "kept": len(kept), "prompts": len(prompts)}


def peers(args: argparse.Namespace, lm: jaxinf.LM, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """transformers' own speed-ups with the same pair, on prompts whose plain continuation does not loop."""
    if speculative_peers.version() is None:
        note("transformers is not installed: its rows are left out")
        return []
    with tempfile.TemporaryDirectory() as scratch:
        note("exporting the pair for transformers")
        small = jaxinf.LM.from_pretrained(DATA / "bfloat16" / "stdlib-draft", dtype="float32", layout="list")
        _, large = opened(args, dtype="float32", layout="list")
        target = speculative_peers.export(large, Path(scratch) / "target")
        draft = speculative_peers.export(small, Path(scratch) / "draft")
        peer = speculative_peers.Peer(target, draft)
        plain = [a.tokens for p in prompts for a in [lm.generate(p, args.new, eos=())]]
        kept = [p for p, tokens in zip(prompts, plain, strict=True) if not loops(tokens)][: args.timed]
        seconds: dict[str, list[float]] = {how: [] for how in ("plain", "assisted", "lookup")}
        passes = dict.fromkeys(seconds, 0)
        for turn in range(args.rounds + 1):
            note(f"transformers, round {turn} of {args.rounds}")
            for how in seconds:
                total = 0.0
                for prompt in kept:
                    out, took, count = peer.generate(prompt, args.new, how, 4)
                    total += took
                    passes[how] += count if turn else 0
                    assert len(out) <= args.new
                if turn:
                    seconds[how].append(total)
        tokens = args.new * len(kept) * args.rounds
        return [
            {
                "label": f"transformers {speculative_peers.version()}: {how}",
                "tokens_per_pass": tokens / passes[how],
                "faster_1": statistics.median(p / s for p, s in zip(seconds["plain"], seconds[how], strict=True)),
            }
            for how in ("assisted", "lookup")
        ]


def printed(found: dict[str, Any], theirs: list[dict[str, Any]], batch: int) -> None:
    headers = ["drafter", "nodes", "tokens/pass", "at T=1", "accepted", "same", "faster", f"batch {batch}"]
    lines = []
    for row in found["rows"]:
        faster = [f"{row[k]:.2f}x" if k in row else "-" for k in ("faster_1", f"faster_{batch}")]
        lines.append(
            [
                row["label"] + ("" if row["exact"] else " (not exact)"),
                str(row["drafted"]),
                f"{row['greedy']['tokens_per_pass']:.2f}",
                f"{row['temperature_1']['tokens_per_pass']:.2f}",
                " ".join(f"{a:.2f}" for a in row["greedy"]["acceptance"][:5]),
                f"{row['same']}/{found['prompts']}",
                *faster,
            ]
        )
    for row in theirs:
        lines.append(
            [row["label"], "4", f"{row['tokens_per_pass']:.2f}", "", "", "", f"{row['faster_1']:.2f}x", ""]
        )
    widths = [max(len(line[i]) for line in [headers, *lines]) for i in range(len(headers))]
    for line in [headers, *lines]:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def plotted(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        shares = row["greedy"]["acceptance"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=row["label"])
    axes.set(xlabel="place of the drafted token", ylabel="accepted, of those before which all stood", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "bfloat16" / "stdlib"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--widen", type=int, metavar="WIDTH", help="hidden channels of its dense feed-forward layers"
    )
    parser.add_argument("--drafters", type=lambda text: text.split(","), help="rows by label; default: all")
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--timed", type=int, default=16, help="prompts of the rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    labels = [row.label for row in ROWS]
    if unknown := set(args.drafters or ()) - set(labels):
        raise SystemExit(f"unknown drafters: {', '.join(sorted(unknown))}; there are {', '.join(labels)}")
    warnings.filterwarnings("ignore", module="transformers|torch|speculative_peers")

    source, lm = opened(args, dtype=args.dtype)
    prompts = prompts_of(lm, args.prompts, args.prompt_tokens)
    found = ours(args, source, lm, prompts)
    theirs = [] if args.no_peer or args.no_speed else peers(args, lm, prompts)
    where = jax.devices()[0].device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    size = widening.parameters(lm.model) / 1e6
    print(
        f"{Path(args.model).name} ({size:.1f} M parameters) in {args.dtype} on {where} ({cores} cores): "
        f"{found['kept']} of {found['prompts']} greedy continuations of {args.new} tokens do not loop"
    )
    printed(found, theirs, args.batch)
    if args.json:
        facts = {
            "model": Path(args.model).name,
            "parameters_m": round(size, 1),
            "dtype": args.dtype,
            "device": f"{where} ({cores} cores)",
        }
        facts |= {"new": args.new, "prompt_tokens": args.prompt_tokens, "jax": jax.__version__}
        args.json.write_text(json.dumps({**facts, **found, "peers": theirs}, indent=1) + "\n")
    if args.plot:
        plotted(found["rows"], args.plot)


if __name__ == "__main__":
    main()
