"""`jaxinf plan`: whether a model fits a slice of TPUs, on which mesh it runs best, and how fast."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxinf.cli import output
from jaxinf.cli.options import add_cache, add_dtype, add_json, count

if TYPE_CHECKING:
    from jaxinf.aot.plan import Plan, Terms, Use

DOES_NOT_FIT = 3

EPILOG = """\
examples:
  jaxinf plan llama-3.1-70b --tpu v5e-16 --quantize int8 --batch 16 --context 4096
  jaxinf plan Qwen/Qwen3-32B --compare v5e-8,v6e-4 --price v5e=1.2 --price v6e=2.7
  jaxinf plan ./my-model --tpu v6e-4 --mesh data=2,tensor=2 --json --picture memory.svg

No TPU and no weights are needed. With libtpu (`pip install "jaxinf[tpu]"`, Linux) the programs are compiled for
the slice, and memory is the compiler's own account; without it all figures are arithmetic. Times are modelled, not
measured. v5e and v6e slices count chips, v4, v5p and tpu7x slices cores; v6e:2x4 names a topology.
exit code 3: it does not fit; the report says what would.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="preset, embedded model, folder, config.json, or owner/name on the Hub"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tpu", metavar="SLICE", help="such as v5e-16, v5p-128, v6e:2x4")
    where.add_argument("--compare", metavar="SLICES", help="several, separated by commas: a table of them")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="rows at a time (default: 1)")
    parser.add_argument(
        "--context", type=count, metavar="N", help="tokens a row (default: 4096, or the model's if that is less)"
    )
    parser.add_argument(
        "--prompt", type=count, metavar="N", help="tokens of each prompt (default: half the context)"
    )
    parser.add_argument(
        "--mesh",
        default="auto",
        help='"auto" (default), or axes such as data=2,tensor=8 (pipeline, sequence, expert)',
    )
    parser.add_argument("--quantize", metavar="SCHEME", help="of the weights: int8, int4, w8a8, nf4, ...")
    add_dtype(parser, "the checkpoint's; bfloat16 for a preset")
    add_cache(parser)
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="CHIP=PRICE",
        help="of a chip-hour, such as v5e=1.2 (repeatable)",
    )
    parser.add_argument("--arithmetic", action="store_true", help="do not ask the TPU compiler: answers at once")
    parser.add_argument("--picture", metavar="FILE", help="draw the memory of a chip (.png, .svg, .pdf)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is only described, also where there is one
    from jaxinf.aot import plan as plans
    from jaxinf.aot.plan import report
    from jaxinf.lm.architecture import architecture

    prices = _prices(args.price)
    found = architecture(args.model, fetch=True)
    context = args.context or min(4096, found.spec.context)
    case = plans.Case(
        model=args.model,
        spec=found.spec,
        batch=args.batch,
        context=context,
        prompt=args.prompt or max(1, context // 2),
        dtype=args.dtype or found.dtype,
        quantize=args.quantize or found.quantize,
        cache=args.cache,
    )
    slices = args.compare.split(",") if args.compare else [args.tpu]
    made = plans.compare(
        case, slices, mesh=args.mesh, compiled=False if args.arithmetic else None, progress=output.note
    )
    if args.json:
        documents = [_priced(report.document(p), p, prices) for p in made]
        output.print_json(documents if args.compare else documents[0])
    elif args.compare:
        print(_comparison(made, prices))
    else:
        print(_text(made[0], prices))
    if args.picture:
        report.picture(made, args.picture)
        output.note(f"drawn to {args.picture}")
    return 0 if any(p.fits for p in made) else DOES_NOT_FIT


def _prices(given: Sequence[str]) -> dict[str, float]:
    """Prices of a chip-hour by chip."""
    from pallas_kernels import chips
    from pallas_kernels.errors import InputError

    prices = {}
    for text in given:
        chip, _, price = text.partition("=")
        try:
            value = float(price)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise InputError(f"price={text!r} must be a chip and what an hour of it costs, such as v5e=1.2")
        prices[chips.find(chip).name] = value
    return prices


def _cost(plan: Plan, prices: dict[str, float]) -> float | None:
    """Of a million tokens."""
    price = prices.get(plan.where.chip.name)
    return None if price is None else price * plan.chip_hours_per_million_tokens


def _priced(document: dict, plan: Plan, prices: dict[str, float]) -> dict:
    cost = _cost(plan, prices)
    return document if cost is None else document | {"cost_per_million_tokens": cost}


def _witness(plan: Plan) -> str:
    if plan.compiler is None:
        return "arithmetic alone"
    return f"compiled by {plan.compiler} in {plan.compile_seconds:.0f} s; times modelled, not measured"


def _text(plan: Plan, prices: dict[str, float]) -> str:
    case, where = plan.case, plan.where
    shape = "x".join(map(str, where.shape))
    devices = f", {where.devices} devices" if where.devices != where.chips else ""
    lines = [
        f"{case.model} in {_kind(plan)} on {where.name}: {where.chips} chips, {shape}{devices}; mesh {plan.mesh}",
        f"batch {case.batch:,}, context {case.context:,}, prompts of {case.prompt:,} tokens ({_witness(plan)})",
        "",
        _verdict(plan),
        "",
        _memory(plan),
        "",
        _speed(plan, prices),
    ]
    if plan.collectives:
        lines += ["", "a decode step's collectives", _uses(plan.collectives)]
    if plan.prefill_collectives:
        lines += ["", "the prefill's collectives", _uses(plan.prefill_collectives)]
    lines += ["", f"largest batch at this context: {plan.largest_batch:,}"]
    lines += [f"largest context at this batch: {plan.largest_context:,}"]
    if len(plan.ranking) > 1:
        lines += ["", "meshes, the best first", _ranking(plan)]
    if plan.notes:
        lines += ["", *(f"note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def _kind(plan: Plan) -> str:
    case = plan.case
    return (case.quantize or case.dtype) + ("" if case.cache is None else f" (cache in {case.cache})")


def _verdict(plan: Plan) -> str:
    per_chip = plan.per_chip
    if plan.fits:
        return f"fits: {output.size(per_chip.free)} of {output.size(per_chip.hbm)} a chip are left"
    return f"DOES NOT FIT: {output.size(-per_chip.free)} a chip are missing; take {plan.remedy}"


def _memory(plan: Plan) -> str:
    per_chip = plan.per_chip
    rows = [("a chip", "")]
    rows += [(name, output.size(size)) for name, size in vars(per_chip).items() if name != "hbm"]
    rows.append(("HBM", output.size(per_chip.hbm)))
    return output.table(rows, header=True, right=True)


def _speed(plan: Plan, prices: dict[str, float]) -> str:
    d, p, case = plan.decode, plan.prefill, plan.case
    hours = plan.chip_hours_per_million_tokens
    cost = _cost(plan, prices)
    money = "" if cost is None else f", which cost {cost:,.2f}"
    return "\n".join(
        [
            f"decode: {_ms(d.step_seconds)} a step, {d.tokens_per_second:,.0f} tokens/s "
            f"({d.tokens_per_second_per_row:,.1f} a row), bound by {d.bound}",
            f"        {_terms(d.terms)}; {hours:.2f} chip-hours per million tokens{money}",
            f"prefill: {_ms(p.seconds)} for {case.batch:,} x {case.prompt:,} tokens to their first token, bound by "
            f"{p.bound}",
            f"        {_terms(p.terms)}",
        ]
    )


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _terms(terms: Terms) -> str:
    return f"alone: HBM {_ms(terms.hbm)}, MXU {_ms(terms.mxu)}, ICI {_ms(terms.ici)}"


def _uses(uses: Sequence[Use]) -> str:
    rows = [["kind", "axis", "chips", "bytes", "times", "sent a chip", "time"]]
    for u in uses:
        figures = [str(u.chips), f"{u.bytes:,}", f"{u.times:,}", output.size(u.sent), _ms(u.seconds)]
        rows.append([u.kind, u.axis, *figures])
    return output.table(rows, header=True)


def _ranking(plan: Plan) -> str:
    from jaxinf.aot.plan.types import ARITHMETIC

    rows = [["mesh", "a step", "by", "prefill", "peak a chip", ""]]
    for r in plan.ranking:
        peak = output.size(r.peak * plan.where.facts.devices)
        by = "arithmetic" if r.witness == ARITHMETIC else "compiled"
        rows.append([r.mesh, _ms(r.step_seconds), by, _ms(r.prefill_seconds), peak, r.why or "the best"])
    return output.table(rows, header=True)


def _comparison(plans: Sequence[Plan], prices: dict[str, float]) -> str:
    case = plans[0].case
    head = ["slice", "mesh", "fits", "left a chip", "a step", "tokens/s", "a row", "prefill", "largest batch"]
    rows = [[*head, "chip-hours per million", *(["cost"] if prices else [])]]
    for p in plans:
        cost = _cost(p, prices)
        row = [
            p.where.name,
            p.mesh,
            "yes" if p.fits else "NO",
            _signed(p.per_chip.free),
            _ms(p.decode.step_seconds),
        ]
        row += [f"{p.decode.tokens_per_second:,.0f}", f"{p.decode.tokens_per_second_per_row:,.1f}"]
        row += [_ms(p.prefill.seconds), f"{p.largest_batch:,}", f"{p.chip_hours_per_million_tokens:.2f}"]
        rows.append([*row, *(["-" if cost is None else f"{cost:,.2f}"] if prices else [])])
    lines = [
        f"{case.model} in {_kind(plans[0])}: batch {case.batch:,}, context {case.context:,}, prompts of "
        f"{case.prompt:,} tokens ({_witness(plans[0])})",
        "",
        output.table(rows, header=True),
    ]
    lines += [f"{p.where.name} does not fit; take {p.remedy}" for p in plans if not p.fits]
    return "\n".join(lines)


def _signed(size: int) -> str:
    return output.size(size) if size >= 0 else f"-{output.size(-size)}"
