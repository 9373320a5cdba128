"""`jaxinf quantize`: a checkpoint with its matrices stored narrower."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinf.cli import output
from jaxinf.cli.device import open_device
from jaxinf.cli.options import add_dtype, add_json, count

if TYPE_CHECKING:
    from jaxinf.compression import Calibration

EPILOG = """\
examples:
  jaxinf quantize ./llama ./llama-int8
  jaxinf quantize ./llama ./llama-int4 --scheme int4 --group 64 --rules 'layers.*.attention.*=int8'
  jaxinf quantize ./llama ./llama-gptq --scheme gptq --calibration notes.txt book.txt

DST appears whole or not at all. A run that ends early leaves .DST.unfinished beside it: the same command goes on
there. Embeddings, the head, norms, biases and routers keep their precision.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "source", metavar="SRC", help="embedded model, folder, or owner/name on the Hugging Face Hub"
    )
    parser.add_argument("target", metavar="DST", help="the folder to write")
    parser.add_argument(
        "--scheme",
        default="int8",
        metavar="S",
        help="int8, int4, fp8_e4m3, fp8_e5m2, mxfp4, nf4, ternary, kmeans4, kmeans8, w8a8; with text to look at: "
        "smoothquant, llm-int8, awq, gptq (default: int8)",
    )
    parser.add_argument("--group", type=count, metavar="N", help="rows that share a scale (default: the format's)")
    parser.add_argument(
        "--rules",
        nargs="+",
        type=_rule,
        default=[],
        metavar="PATTERN=FORMAT",
        help="matrices that get another format, or 'keep': 'layers.0.*=keep'; the last one that matches counts",
    )
    parser.add_argument("--calibration", nargs="+", metavar="FILE", help="text that shows the model's inputs")
    parser.add_argument(
        "--rows", type=count, default=64, metavar="N", help="of that text, so many (default: 64) ..."
    )
    parser.add_argument(
        "--length", type=count, metavar="N", help="... of so many tokens (default: 512, or the context)"
    )
    forms = ("safetensors", "orbax")
    parser.add_argument("--to", choices=forms, default=forms[0], help="how weights are kept (default: safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    add_dtype(parser, "the checkpoint's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.compression import scheme_of
    from jaxinf.compression.stored import quantize_folder
    from jaxinf.lm import locate
    from pallas_kernels.errors import InputError

    target = Path(args.target)
    if not args.overwrite and target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is there already; give another name, or --overwrite to replace a checkpoint")
    scheme = scheme_of(args.scheme)
    source = locate(args.source)
    open_device()
    calibration = _calibration(args, source) if scheme.calibrated else None
    with _kept(target), output.progress("quantising", "layers" if scheme.calibrated else "bytes") as progress:
        quantize_folder(
            source,
            target,
            args.scheme,
            group=args.group,
            rules=dict(args.rules),
            calibration=calibration,
            to=args.to,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=progress,
            note=output.note,
        )
    files = sorted(path for path in target.rglob("*") if path.is_file())
    written = sum(path.stat().st_size for path in files)
    if args.json:
        document = {"source": str(source), "target": str(target), "scheme": args.scheme, "form": args.to}
        output.print_json(document | {"bytes": written, "files": [str(path.relative_to(target)) for path in files]})
    else:
        print(f"{target}: {args.scheme}, {output.size(written)} in {len(files)} files")
    return 0


@contextlib.contextmanager
def _kept(target: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        output.note(f"what is done is kept in {target.parent / f'.{target.name}.unfinished'} for the same command")
        raise


def _rule(text: str) -> tuple[str, str]:
    pattern, sign, name = text.rpartition("=")
    if not sign or not pattern or not name:
        raise argparse.ArgumentTypeError(f"{text!r} must be PATTERN=FORMAT, such as 'layers.0.*=keep'")
    return pattern, name


def _calibration(args: argparse.Namespace, source: Path) -> Calibration:
    from jaxinf.checkpoint import read_spec
    from jaxinf.compression import Calibration
    from jaxinf.lm.tokenizer import Tokenizer
    from pallas_kernels.errors import InputError

    if not args.calibration:
        raise InputError(f"{args.scheme} is calibrated with text; give --calibration FILE")
    tokenizer = Tokenizer.from_folder(source)
    if tokenizer is None:
        raise InputError(f"{source} has no tokenizer, so text cannot be read; add its tokenizer.json")
    length = args.length or min(512, read_spec(source).context)
    return Calibration.of_texts(_texts(args.calibration), tokenizer.encode, rows=args.rows, length=length)


def _texts(files: Sequence[str]) -> Iterator[str]:
    from pallas_kernels.errors import InputError

    for file in files:
        try:
            yield Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
