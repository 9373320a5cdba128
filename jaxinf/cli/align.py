"""`jaxinf train-drafter TARGET --align`: a draft model learns its target's distributions."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinf.cli import output
from jaxinf.cli.device import open_device

if TYPE_CHECKING:
    import numpy as np

    from jaxinf.lm.tokenizer import Tokenizer
    from jaxinf.training.data import Documents

TOKENIZER = "tokenizer.json"
LOSSES = ("tvd", "forward-kl", "reverse-kl")
PROBE = 20_000
"""Characters by which two tokenizers are compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `--align` takes beside the options that all training of drafters has."""
    group = parser.add_argument_group(
        "alignment", "a draft model of the same vocabulary is trained to match TARGET (DistillSpec)"
    )
    group.add_argument("--align", action="store_true", help="align --draft with TARGET")
    group.add_argument("--draft", metavar="MODEL", help="where the draft starts: embedded model, folder, or Hub id")
    group.add_argument(
        "--loss", choices=LOSSES, default=LOSSES[0], help=f"what is minimised (default: {LOSSES[0]})"
    )
    group.add_argument(
        "--on-policy",
        type=_share,
        default=0.0,
        metavar="P",
        help="share of the batches that a model writes itself, from the beginnings of texts (default: 0)",
    )
    group.add_argument(
        "--from",
        dest="source",
        choices=("draft", "target"),
        default="draft",
        help="which model writes them (default: draft)",
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        metavar="FILE",
        help="text to measure on (default: the end of --text; without that, the standard library's held-out files)",
    )


def run(args: argparse.Namespace) -> int:
    """Aligns, prints the report, and returns the exit code."""
    from jaxinf import checkpoint
    from jaxinf.checkpoint.folders import tokenizer_files
    from jaxinf.lm import locate
    from jaxinf.training.align import AlignSpec, align, check_pair
    from pallas_kernels.errors import InputError

    if args.draft is None:
        raise InputError("--align needs the draft to start from: give --draft MODEL")
    folders = locate(args.target), locate(args.draft)
    out = Path(args.out)
    open_device()
    target = checkpoint.load(folders[0], dtype="float32", layout="list").model
    draft = checkpoint.load(folders[1], layout="list")
    check_pair(target, draft.model)
    options = dict(loss=args.loss, on_policy=args.on_policy, source=args.source, batch=args.batch, seed=args.seed)
    spec = AlignSpec(**options)
    peak, rate = spec.optimizer, args.rate or 1.0
    peak = replace(peak, matrix_rate=rate * peak.matrix_rate, other_rate=rate * peak.other_rate)
    longest = min(spec.context, target.spec.context, draft.model.spec.context)
    spec = replace(
        spec,
        steps=args.steps or spec.steps,
        context=longest,
        prompt=min(spec.prompt, max(1, longest // 8)),
        optimizer=peak,
    )
    documents, held_out = _text(args, *folders, opener(draft.generation))
    with kept(out), output.progress("aligning", "steps") as bar:

        def show(record) -> None:
            done = record.step / spec.steps if args.minutes is None else record.progress
            bar(record.step, max(record.step, round(record.step / done) if done else spec.steps))

        found = align(
            target,
            draft,
            documents,
            held_out,
            spec,
            out,
            tokenizer_files=tokenizer_files(folders[1]),
            minutes=args.minutes,
            resume=args.resume,
            on_step=show,
            note=output.note,
        )
    if args.json:
        output.print_json({"target": args.target, "draft": args.draft, "export": str(out / "export"), **found})
    else:
        print(table(found))
        print(f"{out / 'export'}: the aligned draft; {out / 'report.json'}: these figures")
    return 0


def table(found: dict[str, Any]) -> str:
    """The report of `jaxinf.training.align.align` for people."""
    rows = [("contexts", "places", "acceptance at T=1", "rejections gone", "greedy agreement", "rejections gone")]
    for some in found["contexts"]:
        cells = []
        for name in ("acceptance", "agreement"):
            figures = some[name]
            cells += [f"{figures['before']:.3f} -> {figures['after']:.3f}", f"{figures['rejections_gone']:.1%}"]
        looped = f" ({some['left_out']} rows that loop left out)" if some["left_out"] else ""
        rows.append((some["contexts"] + looped, f"{some['places']:,}", *cells))
    return output.table(rows, header=True, right=True)


@contextlib.contextmanager
def kept(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        output.note(f"what is done is kept in {out / 'checkpoints'}: the same command with --resume goes on")
        raise


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share from 0 to 1")
    return value


def _text(args: argparse.Namespace, target: Path, draft: Path, first: int | None) -> tuple[Documents, np.ndarray]:
    """`(what is trained on, tokens held out)`, in the tokens of both models, texts behind the token `first`."""
    from jaxinf.training.align import text
    from jaxinf.training.corpus import read_part
    from jaxinf.training.run import held_out_text, prepare

    def strings(files: dict[str, bytes]) -> list[str]:
        return [data.decode() for data in files.values()]

    library = strings(held_out_text()) if args.text is None else []
    given = [] if args.text is None else read(args.text)
    tokenizer = _tokenizer(target, draft, "".join(library or given)[:PROBE])

    def encode(texts: Sequence[str]) -> Documents:
        return text.encode(texts, lambda one: tokenizer.encode(one, add_special_tokens=False), first)

    held_out = encode(library if args.held_out is None else read(args.held_out)).tokens
    if args.text is not None:
        documents = encode(given)
        return text.split(documents) if args.held_out is None else (documents, held_out)
    if _same_file(args.data / TOKENIZER, target / TOKENIZER):
        return prepare(args.data), held_out
    output.note("encoding the standard library")
    return encode(strings(read_part("train"))), held_out


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _tokenizer(target: Path, draft: Path, probe: str) -> Tokenizer:
    """The tokenizer of both.

    Raises:
      InputError: one of them has none, or they cut the probe differently.
    """
    from jaxinf.lm.tokenizer import Tokenizer
    from pallas_kernels.errors import InputError

    found = []
    for folder in (target, draft):
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise InputError(f"{folder} has no tokenizer, so text cannot be read; add its tokenizer.json")
        found.append(tokenizer)
    if found[0].vocab_size != found[1].vocab_size or found[0].encode(probe) != found[1].encode(probe):
        raise InputError("the draft's tokenizer is not the target's: give a draft with the target's tokenizer")
    return found[0]


def opener(generation: dict[str, Any]) -> int | None:
    """The token that begins a text, by a generation_config.json: of beginning, else of end."""
    found = generation.get("bos_token_id", generation.get("eos_token_id"))
    return found[0] if isinstance(found, list) else found


def read(files: Sequence[str]) -> list[str]:
    from pallas_kernels.errors import InputError

    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return texts
