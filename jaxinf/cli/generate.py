"""`jaxinf generate`: text from a model, as it is written."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from jaxinf.cli import interrupts, output
from jaxinf.cli.device import open_device
from jaxinf.cli.options import add_cache, add_dtype, add_json, count

if TYPE_CHECKING:
    from jaxinf.lm import LM, Completion

EPILOG = """\
examples:
  jaxinf generate 'def quicksort(items):'
  jaxinf generate 'import ' --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 7
  git diff | jaxinf generate - --model ./my-model --chat --json
  jaxinf generate 'class Tree:' --model ./my-model --mesh tensor=8
  jaxinf generate 'class Tree:' --draft ngram --max-new-tokens 400
  jaxinf generate 'class Tree:' --model ./large --draft ./small --draft-tokens 5

Text goes to stdout, counts and times to stderr. The first run of a size compiles; later ones find the programs
in a cache folder (JAXINF_COMPILATION_CACHE=0 turns that off, a path moves it).
"""

DRAFTER, PAYS = "ngram", 128
"""What drafts for the embedded model, and from how many tokens on it pays: its programs have to be loaded, too."""

SAMPLING = {
    "temperature": (float, "T", "divides the logits; 0 takes the likeliest token"),
    "top-k": (int, "K", "draw from the K likeliest tokens"),
    "top-p": (float, "P", "draw from the likeliest tokens that have probability P together"),
    "min-p": (float, "P", "draw from tokens at least P times as likely as the likeliest"),
    "repetition-penalty": (float, "R", "makes tokens that are there already less likely; 1 does nothing"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    parser.add_argument(
        "--model",
        default="stdlib",
        metavar="NAME",
        help="embedded model, folder, or owner/name on the Hugging Face Hub (default: stdlib)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the checkpoint's, else 64")
    for name, (kind, metavar, text) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{text} (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random draws (default: 0)")
    parser.add_argument("--stop", action="append", metavar="S", help="end before this string (repeatable)")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="answers; more than one appear when done")
    parser.add_argument("--window", type=int, metavar="W", help="bound the memory: remember the latest W tokens")
    parser.add_argument("--sinks", type=int, metavar="S", help="and the first S (default with --window: 4)")
    add_cache(parser)
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message to a chat model")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument("--mesh", metavar="M", help='spread the model over devices: "tensor=4,data=2", or auto')
    parser.add_argument(
        "--quantize", metavar="S", help="round weights while they are read: int8, int4, w8a8, nf4, ..."
    )
    parser.add_argument("--programs", metavar="DIR", help="programs that `jaxinf compile` saved")
    parser.add_argument(
        "--draft",
        metavar="D",
        help="write the same in fewer passes with a drafter: a smaller model, a folder of heads, a datastore, "
        f"ngram, lookahead, self, medusa, eagle; none (default: {DRAFTER} for the embedded model where at least "
        f"{PAYS} tokens are asked for, else none)",
    )
    parser.add_argument("--draft-tokens", type=count, metavar="N", help="of a draft at most (default: its own)")
    add_dtype(parser, "the checkpoint's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.lm import LM, locate
    from pallas_kernels.errors import InputError

    prompt = _stdin() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InputError("the prompt is empty; give some text, or - to read it from stdin")
    folder = locate(args.model)
    open_device()
    lm = LM.from_pretrained(
        folder, dtype=args.dtype, mesh=args.mesh, quantize=args.quantize, programs=args.programs
    )
    if drafter := _drafter(args):
        lm = lm.with_drafter(drafter, args.draft_tokens)
    given: Any = lm.chat_tokens([{"role": "user", "content": prompt}]) if args.chat else prompt
    options = {name: getattr(args, name.replace("-", "_")) for name in ("seed", "stop", "window", "sinks", "cache")}
    options |= {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in SAMPLING}
    if args.n == 1 and not args.json:
        answers = [_stream(lm, given, args, prompt, options)]
    else:
        many = lm.generate(given, args.max_new_tokens, n=args.n, **options)
        answers = [many] if args.n == 1 else many
        if args.json:
            output.print_json(_document(args, prompt, answers))
        else:
            _print_all(answers, prompt if args.echo else "")
    if not args.json:
        output.note(_summary(answers))
    return 130 if any(answer.finish_reason == "interrupted" for answer in answers) else 0


def _drafter(args: argparse.Namespace) -> str | None:
    """What to draft with, as asked for or where it pays."""
    from pallas_kernels.errors import InputError

    if args.draft is not None:
        return None if args.draft == "none" else args.draft
    if args.draft_tokens is not None:
        raise InputError(f"--draft-tokens {args.draft_tokens} is for a drafter: name one with --draft")
    pays = args.model == "stdlib" and (args.max_new_tokens or 0) >= PAYS and args.mesh is None
    return DRAFTER if pays else None


def _stream(lm: LM, given: Any, args: argparse.Namespace, prompt: str, options: dict[str, Any]) -> Completion:
    stream = lm.stream(given, args.max_new_tokens, **options)
    last = ""
    if args.echo:
        print(prompt, end="", flush=True)
        last = prompt
    try:
        for last in stream:
            print(last, end="", flush=True)
            interrupts.check()
    except KeyboardInterrupt:  # while it was printed
        rest = stream.stop()
        print(rest, end="", flush=True)
        last = rest or last
    if not last.endswith("\n"):
        print(flush=True)
    assert stream.completion is not None
    return stream.completion


def _print_all(answers: list[Completion], before: str) -> None:
    for i, answer in enumerate(answers, 1):
        print(f"--- {i} of {len(answers)}")
        text = before + answer.text
        print(text, end="" if text.endswith("\n") else "\n")


def _summary(answers: list[Completion]) -> str:
    stats = [answer.stats for answer in answers]
    tokens = sum(s.new_tokens for s in stats)
    if tokens == 0:
        return f"no tokens ({answers[0].finish_reason})"
    parts = [f"{tokens} tokens", f"first after {output.seconds(stats[0].first_token_seconds)}"]
    if any(s.drafting is not None for s in stats):
        passes = sum(s.passes - 1 for s in stats)
        parts.append(f"{sum(s.drafting.written for s in stats if s.drafting) / max(passes, 1):.2f} tokens a pass")
    # Rows run side by side: what they wrote after their first tokens, over the time of the longest.
    rest = max(s.seconds - s.first_token_seconds for s in stats)
    if tokens > len(answers) and rest > 0:
        parts.append(f"{(tokens - len(answers)) / rest:.1f} tokens/s")
    return f"{', '.join(parts)} ({', '.join(dict.fromkeys(a.finish_reason for a in answers))})"


def _document(args: argparse.Namespace, prompt: str, answers: list[Completion]) -> dict[str, Any]:
    return {
        "model": args.model,
        "prompt": prompt,
        "completions": [
            {
                "text": answer.text,
                "tokens": answer.tokens,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.stats.prompt_tokens,
                "new_tokens": answer.stats.new_tokens,
                "first_token_seconds": answer.stats.first_token_seconds,
                "seconds": answer.stats.seconds,
                "tokens_per_second": answer.stats.tokens_per_second,
                "passes": answer.stats.passes,
                "tokens_per_pass": answer.stats.tokens_per_pass,
            }
            for answer in answers
        ],
    }


def _stdin() -> str:
    from pallas_kernels.errors import InputError

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text: {error.reason} at byte {error.start}") from None
