"""`jaxinf compile`: a model's programs in a folder, for later starts."""

from __future__ import annotations

import argparse

from jaxinf.cli import output
from jaxinf.cli.device import open_device
from jaxinf.cli.generate import SAMPLING
from jaxinf.cli.options import add_cache, add_dtype, add_json, count, counts

PLATFORMS = ("cpu", "tpu", "cuda")

EPILOG = """\
examples:
  jaxinf compile stdlib ./programs
  jaxinf compile ./my-model ./programs --mesh tensor=8 --prompt 128,1024 --new 256 --batch 1,8
  jaxinf generate 'class Tree:' --model ./my-model --mesh tensor=8 --programs ./programs

Lengths are bucketed, so one program serves prompts of similar lengths. A program is for this device, this version
of JAX and this model's shapes; where anything differs, it is not used and one warning says why. It is machine code:
use programs from where you trust them. DST is written beside and renamed: it is complete or it is not there.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="embedded model, folder, or owner/name on the Hugging Face Hub"
    )
    parser.add_argument("target", metavar="DST", help="the folder to write")
    parser.add_argument("--prompt", type=counts, default=[64], metavar="N,N", help="prompt lengths (default: 64)")
    parser.add_argument("--new", type=count, metavar="N", help="new tokens (default: the checkpoint's, else 64)")
    parser.add_argument("--batch", type=counts, default=[1], metavar="B,B", help="prompts a call (default: 1)")
    for name, (kind, metavar, _) in SAMPLING.items():
        parser.add_argument(
            f"--{name}", type=kind, metavar=metavar, help="as for generate: another program with it"
        )
    add_cache(parser)
    parser.add_argument("--mesh", metavar="M", help='spread the model over devices: "tensor=4,data=2", or auto')
    parser.add_argument(
        "--portable",
        type=_platforms,
        default=(),
        metavar="P,P",
        help=f"also as StableHLO for {', '.join(PLATFORMS)}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace programs that are there")
    add_dtype(parser, "the checkpoint's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.aot.export import check_folder
    from jaxinf.lm import LM, locate

    check_folder(args.target, overwrite=args.overwrite)
    folder = locate(args.model)
    open_device()
    lm = LM.from_pretrained(folder, dtype=args.dtype, mesh=args.mesh)
    options = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in (*SAMPLING, "cache")}
    written = dict(overwrite=args.overwrite, portable=args.portable)
    programs = lm.save_programs(args.target, args.prompt, args.new, batch=args.batch, **written, **options)
    total = sum(program["bytes"] for program in programs)
    if args.json:
        listed = [{key: program[key] for key in ("name", "file", "bytes")} for program in programs]
        output.print_json({"model": args.model, "target": args.target, "bytes": total, "programs": listed})
    else:
        print(f"{args.target}: {output.size(total)} in {len(programs)} programs")
    return 0


def _platforms(text: str) -> tuple[str, ...]:
    found = tuple(filter(None, text.split(",")))
    if not found or not set(found) <= set(PLATFORMS):
        raise argparse.ArgumentTypeError(f"{text!r} must be of {', '.join(PLATFORMS)}, separated by commas")
    return found
