"""`jaxinf bench`: how fast, and in what memory, on the device at hand."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jaxinf.cli import output
from jaxinf.cli.device import open_device
from jaxinf.cli.options import add_dtype, add_json, count, counts

if TYPE_CHECKING:
    from jaxinf.lm.measure import Device, Measurement

EPILOG = """\
examples:
  jaxinf bench stdlib
  jaxinf bench llama-3.2-1b --batch 1,8 --prompt 128 --new 64 --dtype bfloat16
  jaxinf bench ./config.json --json

A preset or a config.json is measured with random weights: speed and memory are those of any weights.
Times are medians of the repeats, without compilation, which has a column of its own and is not taken from a
cache. Prefill counts prompt tokens, decode the new tokens after each row's first. Peaks are the process's, over
all batches so far.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="embedded model, folder, preset or config.json")
    parser.add_argument("--batch", type=counts, default=[1], metavar="B,B", help="batch sizes (default: 1)")
    parser.add_argument("--prompt", type=count, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    parser.add_argument("--new", type=count, default=64, metavar="N", help="new tokens a row (default: 64)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="measured runs (default: 3)")
    add_dtype(parser, "the checkpoint's; bfloat16 for a preset")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.checkpoint import load
    from jaxinf.generation import Runner
    from jaxinf.lm.architecture import architecture
    from jaxinf.lm.measure import Device, measure, random_model

    found = architecture(args.model)
    open_device()
    if found.folder is not None:
        runner = Runner(load(found.folder, dtype=args.dtype).model)
    else:
        runner = Runner(random_model(found.spec, args.dtype or found.dtype))
    device = Device.at_hand()
    measured = []
    for batch in args.batch:
        with output.progress(f"batch {batch}", "runs") as progress:
            one = measure(
                runner, batch=batch, prompt=args.prompt, new=args.new, repeats=args.repeats, progress=progress
            )
        measured.append(one)
    weights = "random" if found.folder is None else "the checkpoint's"
    if args.json:
        output.print_json(_document(args, device, str(runner.dtype), weights, measured))
    else:
        print(f"{args.model} in {runner.dtype}, weights {weights}, {output.size(measured[0].weights_bytes)}")
        print(f"on {_device(device)}; prompts of {args.prompt} tokens, {args.new} new, median of {args.repeats}\n")
        print(_table(measured))
    return 0


def _device(device: Device) -> str:
    name = device.kind if device.kind == device.platform else f"{device.platform} {device.kind}"
    return name if device.cores is None else f"{name} ({device.cores} cores)"


def _table(measured: list[Measurement]) -> str:
    device = measured[0].peak_device_bytes is not None
    head = ["batch", "prefill tok/s", "first token", "decode tok/s", "compile", "cache", "peak RSS"]
    rows = [head + ["peak device"] * device]
    for m in measured:
        decode = m.decode_tokens_per_second
        row = [
            str(m.batch),
            f"{m.prefill_tokens_per_second:.0f}",
            output.seconds(m.first_token_seconds),
            "-" if decode is None else f"{decode:.1f}",
            output.seconds(m.compile_seconds),
            output.size(m.cache_bytes),
            "-" if m.peak_host_bytes is None else output.size(m.peak_host_bytes),
        ]
        rows.append(row + [output.size(m.peak_device_bytes or 0)] * device)
    return output.table(rows, header=True, right=True)


def _document(
    args: argparse.Namespace, device: Device, dtype: str, weights: str, measured: list[Measurement]
) -> dict[str, Any]:
    import jax

    return {
        "model": args.model,
        "dtype": dtype,
        "weights": weights,
        "device": asdict(device) | {"jax": jax.__version__},
        "results": [
            asdict(m)
            | {
                "prefill_tokens_per_second": m.prefill_tokens_per_second,
                "decode_tokens_per_second": m.decode_tokens_per_second,
            }
            for m in measured
        ],
    }
