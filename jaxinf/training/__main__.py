"""`python -m jaxinf.training`: train and score the embedded models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.errors import InputError, JaxinfError

EXAMPLES = """examples:
  python -m jaxinf.training stdlib                  train the target for its recipe's steps
  python -m jaxinf.training stdlib --minutes 90     end after 90 minutes at most, the rate falling to 0 by then
  python -m jaxinf.training stdlib --resume         go on where it was stopped
  python -m jaxinf.training stdlib-draft --round int4 --group 64 --steps 300
                                                    go on from the embedded model, for weights stored as int4
  python -m jaxinf.training stdlib-draft --round b1.58 --start none
                                                    ternary weights from the beginning
  python -m jaxinf.training evaluate --json         bits per byte of the embedded models and of xz
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m jaxinf.training",
        description="Train and score the embedded models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    for name in ("stdlib", "stdlib-draft"):
        train = verbs.add_parser(name, help=f"train {name}")
        train.add_argument("--steps", type=int, help="updates in all (default: the recipe's)")
        train.add_argument("--minutes", type=float, help="end after this long at most; not bit-reproducible")
        train.add_argument("--out", type=Path, help=f"checkpoints, log, plot, export (default: runs/{name})")
        train.add_argument("--data", type=Path, default=Path("runs/corpus"), help="tokenizer and encoded corpus")
        train.add_argument("--source", type=Path, help="Lib folder of Python 3.11.7 (default: this interpreter's)")
        train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --out")
        rounding = train.add_argument_group(
            "training with rounding", "matrices of attention and feed-forward layers learn to be stored narrower"
        )
        rounding.add_argument("--round", metavar="FORMAT", help="int8, int4, ternary, b1.58, ... (--out gains it)")
        rounding.add_argument("--group", type=int, help="rows that share a scale (default: the format's)")
        rounding.add_argument("--activations", choices=["int8"], help="round inputs to bytes, a scale a token")
        rounding.add_argument("--start", help="model to go on from; none (default: with --round the embedded one)")
        rounding.add_argument("--rate", type=float, help="multiplies peak rates (default: 1, or 0.25 from a model)")
    score = verbs.add_parser("evaluate", help="bits per byte over the held-out text, of models and of xz")
    score.add_argument("models", nargs="*", default=["stdlib", "stdlib-draft"], help="names or folders")
    score.add_argument("--stride", type=int, help="tokens by which windows move (default: half the context)")
    score.add_argument("--context", type=int, help="tokens of a window (default: the model's)")
    score.add_argument("--held-out", type=Path, help="held-out text (default: the one of the tests)")
    score.add_argument("--source", type=Path, help="Lib folder of Python 3.11.7, where the tests are not there")
    score.add_argument("--json", action="store_true", help="one JSON object a line")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(arguments)
    # Imported late: `--help` need not wait for jax.
    from rich.console import Console
    from rich.progress import Progress

    from jaxinf.training import run
    from jaxinf.training.rounding import rounding_of

    console = Console(stderr=True)
    try:
        if options.verb == "evaluate":
            files = run.held_out_text(options.held_out, options.source)
            for model in options.models:
                with Progress(console=console, transient=True) as bar:
                    task = bar.add_task(f"scoring {model}", total=None)

                    def show(done: int, total: int, bar=bar, task=task) -> None:
                        bar.update(task, completed=done, total=total)

                    record = run.evaluate(
                        model, files, context=options.context, stride=options.stride, progress=show
                    )
                if options.json:
                    print(run.as_json(record))
                else:
                    print(
                        f"{model}: {record['bits_per_byte']:.4f} bits per byte; xz -9e: "
                        f"{record['xz_bits_per_byte']:.4f}; {record['below_xz']:.1%} below xz, over "
                        f"{record['bytes']} bytes of {record['files']} held-out files"
                    )
        else:
            if options.round is None and (options.group or options.activations):
                raise InputError("--group and --activations say how to round: give --round a format too")
            rounding = options.round and rounding_of(options.round, options.group, options.activations)
            name = f"{options.verb}-{options.round}" if options.round else options.verb
            run.train(
                options.verb,
                out=options.out or Path("runs") / name,
                data=options.data,
                steps=options.steps,
                minutes=options.minutes,
                resume=options.resume,
                source=options.source,
                console=console,
                rounding=rounding,
                start=options.start,
                rate=options.rate,
            )
    except JaxinfError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; --resume goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
