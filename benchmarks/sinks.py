"""Attention sinks on the embedded model: bits per byte of a text far longer than the context.

    python benchmarks/sinks.py [--tokens 8192] [--json out.json] [--plot out.png]

One pass over held-out text, in stretches of equal length, with three memories:
  everything     every token is kept, so positions leave what the model has learned
  window         the latest tokens alone
  sinks          the latest tokens and the first four (StreamingLLM, Xiao et al. 2024)
Layers that have a window of their own keep it in all three. The figure is the mean over a stretch.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import jaxinf
from jaxinf.training.corpus import read_held_out

STRETCH = 1024
HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "stdlib_heldout.xz"


def stretches(lm: jaxinf.LM, ids: list[int], **memory) -> list[float]:
    """Bits per byte of each stretch of `STRETCH` tokens."""
    assert lm.tokenizer is not None
    bits = -np.concatenate([[0.0], lm.score(ids, **memory).logprobs]) / np.log(2)
    starts = range(0, len(ids) - STRETCH + 1, STRETCH)
    sizes = [len(lm.tokenizer.decode(ids[s : s + STRETCH]).encode()) for s in starts]
    return [float(bits[s : s + STRETCH].sum() / size) for s, size in zip(starts, sizes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * STRETCH)
    parser.add_argument("--window", type=int, default=508, help="tokens kept beside four sinks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    lm = jaxinf.LM.from_pretrained("stdlib", dtype="float32")
    assert lm.tokenizer is not None
    text = max(read_held_out(HELD_OUT).values(), key=len).decode()
    ids = lm.tokenizer.encode(text)[: args.tokens]
    longer = jaxinf.LM(lm.model, lm.tokenizer, context=len(ids))
    memories = {
        "everything": (longer, {}),
        "window": (lm, dict(window=args.window + 4, sinks=0)),
        "sinks": (lm, dict(window=args.window, sinks=4)),
    }
    figures = {}
    for name, (model, memory) in memories.items():
        print(f"scoring {len(ids)} tokens with {name}", file=sys.stderr)
        figures[name] = stretches(model, ids, **memory)

    print(f"bits per byte; context {lm.context}, memory of {args.window + 4} tokens where bounded")
    print("tokens".ljust(14), *(name.rjust(12) for name in figures))
    for i in range(len(figures["sinks"])):
        row = (f"{f[i]:12.3f}" for f in figures.values())
        print(f"{i * STRETCH:6d}-{(i + 1) * STRETCH:<7d}", *row)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot:
        import matplotlib.pyplot as plt

        for name, values in figures.items():
            plt.plot(np.arange(1, len(values) + 1) * STRETCH, values, label=name)
        plt.gca().set(xlabel="tokens read", ylabel="bits per byte", title=f"context {lm.context}")
        plt.legend()
        plt.savefig(args.plot, dpi=80)


if __name__ == "__main__":
    main()
