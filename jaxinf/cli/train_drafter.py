"""`jaxinf train-drafter`: heads, or a draft model, that foresee what a target writes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinf.cli import align, output
from jaxinf.cli.device import open_device
from jaxinf.cli.options import add_json, count

if TYPE_CHECKING:
    import numpy as np

    from jaxinf.training.data import Documents

KINDS = ("medusa", "eagle", "mtp", "pass")
EPILOG = """\
examples:
  jaxinf train-drafter stdlib --kind eagle --out runs/eagle --minutes 40
  jaxinf train-drafter ./llama --kind medusa --out llama-medusa --text notes.txt book.txt --steps 2000
  jaxinf train-drafter stdlib --align --draft stdlib-draft --out runs/aligned

--out receives checkpoints, log.jsonl, report.json and export/, which is the drafter. --resume goes on from the
latest checkpoint; Ctrl-C leaves one. Without --minutes a run is repeatable bit by bit, interrupted or not.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "target", metavar="TARGET", help="embedded model, folder, or owner/name on the Hugging Face Hub"
    )
    parser.add_argument("--kind", choices=KINDS, help="heads to train; TARGET stays as it is")
    parser.add_argument("--out", required=True, metavar="DIR", help="where checkpoints, log and result go")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="to train on (default: the standard library, for embedded models)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="updates in all (default: 2000; 1000 to align)")
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so long; not repeatable bit by bit")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    parser.add_argument("--rate", type=float, metavar="R", help="multiplies the peak rates (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    heads = parser.add_argument_group("heads")
    heads.add_argument("--heads", type=count, default=4, metavar="N", help="of medusa, tokens of pass (default: 4)")
    heads.add_argument("--modules", type=count, default=2, metavar="N", help="of mtp (default: 2)")
    heads.add_argument("--blocks", type=count, default=1, metavar="N", help="of a head or module (default: 1)")
    heads.add_argument(
        "--width", type=count, metavar="N", help="of blocks (default: 3 x the target's; medusa: one matrix)"
    )
    heads.add_argument("--batch", type=count, default=4, metavar="N", help="rows of text a step (default: 4)")
    heads.add_argument("--context", type=count, default=1024, metavar="N", help="tokens of a row (default: 1024)")
    heads.add_argument(
        "--continuations",
        type=int,
        default=3072,
        metavar="N",
        help="rows that the target writes itself, for half of the steps (default: 3072)",
    )
    heads.add_argument(
        "--format", default="int8", metavar="F", help="of stored matrices, or bfloat16 (default: int8)"
    )
    heads.add_argument(
        "--data", type=Path, default=Path("runs/corpus"), metavar="DIR", help="keeps the encoded standard library"
    )
    align.add_arguments(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from pallas_kernels.errors import InputError

    if args.align == (args.kind is not None):
        found = "two things to train were named" if args.align else "nothing to train was named"
        raise InputError(f"{found}: give --kind {'|'.join(KINDS)} for heads, or --align for a draft model")
    for name in ("steps", "minutes", "rate"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)} must be above 0")
    return align.run(args) if args.align else _heads(args)


def _heads(args: argparse.Namespace) -> int:
    from jaxinf import checkpoint
    from jaxinf.lm import locate
    from jaxinf.quant import format_of
    from jaxinf.training.drafters.run import EXPORT, HeadRecipe, told, train_heads
    from pallas_kernels.errors import InputError

    if args.continuations < 0:
        raise InputError(f"--continuations {args.continuations} must be at least 0")
    form = None if args.format == "bfloat16" else format_of(args.format).name
    folder, out = locate(args.target), Path(args.out)
    recipe = HeadRecipe(
        args.kind,
        **{
            name: getattr(args, name)
            for name in ("heads", "modules", "blocks", "width", "batch", "context", "seed")
        },
        continuations=args.continuations,
        format=form,
    )
    peak, rate = recipe.optimizer, args.rate or 1.0
    peak = replace(peak, matrix_rate=rate * peak.matrix_rate, other_rate=rate * peak.other_rate)
    recipe = replace(recipe, steps=args.steps or recipe.steps, optimizer=peak)
    open_device()
    loaded = checkpoint.load(folder, dtype="float32", layout="list")
    documents, held_out = _text(args, folder, loaded.generation)
    with (
        align.kept(out),
        output.progress("training", "steps") as bar,
        output.progress("continuing", "rows") as rows,
    ):

        def show(record) -> None:
            part = record.progress if args.minutes is not None else record.step / recipe.steps
            bar(record.step, max(record.step, round(record.step / part)) if part else recipe.steps)

        found = train_heads(
            loaded.model,
            documents,
            held_out,
            recipe,
            out,
            minutes=args.minutes,
            resume=args.resume,
            on_step=show,
            note=output.note,
            progress=rows,
        )
    if args.json:
        output.print_json({"target": args.target, "export": str(out / EXPORT), **found})
    else:
        print(_table(found))
        print(told(found))
        print(
            f"{out / EXPORT}: {found['kind']}, {output.size(found['bytes'])}; {out / 'report.json'}: these figures"
        )
    return 0


def _table(found: dict[str, Any]) -> str:
    """How often the target's greedy token was among the likeliest of each place."""
    shares = found["agreement"]
    places = len(next(iter(shares.values())))
    rows = [("token ahead", *(f"among {k}" for k in shares))]
    rows += [(str(i + 1), *(f"{values[i]:.3f}" for values in shares.values())) for i in range(places)]
    return output.table(rows, header=True, right=True)


def _text(args: argparse.Namespace, folder: Path, generation: dict[str, Any]) -> tuple[Documents, np.ndarray]:
    """`(what is trained on, tokens held out)`, in the target's tokens."""
    from jaxinf.lm.tokenizer import Tokenizer
    from jaxinf.training.align import text
    from jaxinf.training.run import held_out_text, prepare
    from pallas_kernels.errors import InputError

    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer, so text cannot be read; add its tokenizer.json")

    def encode(texts: Sequence[str]) -> Documents:
        opener = align.opener(generation)
        return text.encode(texts, lambda one: tokenizer.encode(one, add_special_tokens=False), opener)

    held_out = None if args.held_out is None else encode(align.read(args.held_out)).tokens
    if args.text is not None:
        documents = encode(align.read(args.text))
        return text.split(documents) if held_out is None else (documents, held_out)
    documents = prepare(args.data)
    if (folder / "tokenizer.json").read_bytes() != (args.data / "tokenizer.json").read_bytes():
        raise InputError(f"{args.target} has a tokenizer of its own: give --text FILE to train on")
    if held_out is None:
        held_out = encode([data.decode() for data in held_out_text().values()]).tokens
    return documents, held_out
