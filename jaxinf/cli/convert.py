"""`jaxinf convert`: a checkpoint in this project's form."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxinf.cli import output
from jaxinf.cli.device import open_device
from jaxinf.cli.options import add_dtype, add_json

EPILOG = """\
examples:
  jaxinf convert ./llama-hf ./llama
  jaxinf convert ./llama-hf ./llama-bf16 --to orbax --dtype bfloat16

DST is written beside and renamed: it is complete or it is not there.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "source", metavar="SRC", help="embedded model, folder, or owner/name on the Hugging Face Hub"
    )
    parser.add_argument("target", metavar="DST", help="the folder to write")
    forms = ("safetensors", "orbax")
    parser.add_argument("--to", choices=forms, default=forms[0], help="how weights are kept (default: safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    add_dtype(parser, "the checkpoint's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.checkpoint import convert
    from jaxinf.lm import locate
    from pallas_kernels.errors import InputError

    target = Path(args.target)
    if not args.overwrite and target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is there already; give another name, or --overwrite to replace a checkpoint")
    source = locate(args.source)
    open_device()
    with output.progress("writing") as progress:
        convert(source, target, to=args.to, dtype=args.dtype, overwrite=args.overwrite, progress=progress)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    written = sum(path.stat().st_size for path in files)
    if args.json:
        document = {"source": str(source), "target": str(target), "form": args.to, "bytes": written}
        output.print_json(document | {"files": [str(path.relative_to(target)) for path in files]})
    else:
        print(f"{target}: {output.size(written)} in {len(files)} files")
    return 0
