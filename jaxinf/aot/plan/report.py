"""A plan for programs (a JSON document) and for the eye (a picture of a chip's memory)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxinf.aot.plan.types import Decode, PerChip, Plan, Prefill, Terms, Use
from jaxinf.core import to_record
from pallas_kernels.errors import InputError, UnsupportedError

GIB = 1 << 30
_PARTS = {"weights": "#4477aa", "cache": "#66ccee", "temporaries": "#ccbb44", "other": "#bbbbbb"}


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: seconds, bytes and tokens."""
    case = plan.case
    return {
        "model": case.model,
        "tpu": plan.where.name,
        "mesh": plan.mesh,
        "fits": plan.fits,
        "remedy": plan.remedy,
        "batch": case.batch,
        "context": case.context,
        "prompt": case.prompt,
        "dtype": case.dtype,
        "quantize": case.quantize,
        "slice": {
            "chip": plan.where.chip.name,
            "chips": plan.where.chips,
            "cores": plan.where.cores,
            "devices": plan.where.devices,
            "topology": "x".join(map(str, plan.where.shape)),
        },
        "per_chip_bytes": _bytes(plan.per_chip),
        "decode": _decode(plan.decode),
        "prefill": _prefill(plan.prefill),
        "collectives": [_use(u) for u in plan.collectives],
        "prefill_collectives": [_use(u) for u in plan.prefill_collectives],
        "largest_batch": plan.largest_batch,
        "largest_context": plan.largest_context,
        "chip_hours_per_million_tokens": plan.chip_hours_per_million_tokens,
        "ranking": [dict(vars(r)) for r in plan.ranking],
        "compiler": plan.compiler,
        "compile_seconds": plan.compile_seconds,
        "notes": list(plan.notes),
        "spec": to_record(case.spec),
    }


def _bytes(per_chip: PerChip) -> dict[str, int]:
    return dict(vars(per_chip))


def _terms(terms: Terms) -> dict[str, float]:
    return {"hbm_seconds": terms.hbm, "mxu_seconds": terms.mxu, "ici_seconds": terms.ici}


def _decode(decode: Decode) -> dict[str, Any]:
    return {
        "step_seconds": decode.step_seconds,
        "tokens_per_second": decode.tokens_per_second,
        "tokens_per_second_per_row": decode.tokens_per_second_per_row,
        "bound": decode.bound,
        "roofline_seconds": decode.terms.roofline,
        **_terms(decode.terms),
        "witness": decode.witness,
    }


def _prefill(prefill: Prefill) -> dict[str, Any]:
    return {
        "seconds": prefill.seconds,
        "tokens_per_second": prefill.tokens_per_second,
        "bound": prefill.bound,
        "roofline_seconds": prefill.terms.roofline,
        **_terms(prefill.terms),
        "witness": prefill.witness,
    }


def _use(use: Use) -> dict[str, Any]:
    return dict(vars(use))


def picture(plans: tuple[Plan, ...], path: str | Path) -> None:
    """Draws each plan's memory a chip as a bar, to a file whose ending names the format (.png, .svg, .pdf).

    Raises:
      UnsupportedError: matplotlib is not installed.
      InputError: a format that it does not write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            'pictures are drawn by matplotlib, which is not installed: `pip install "jaxinf[notebooks]"`.'
        ) from None
    figure = Figure(figsize=(8, 1.2 + 0.8 * len(plans)), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in formats:
        raise InputError(f"picture={str(path)!r} must end in one of {', '.join(sorted(formats))}")
    axes = figure.add_subplot()
    names = [f"{plan.where.name}, {plan.mesh}" for plan in plans]
    left = [0.0] * len(plans)
    for part, colour in _PARTS.items():
        sizes = [_part(plan.per_chip, part) / GIB for plan in plans]
        axes.barh(names, sizes, left=left, color=colour, label=part, height=0.55)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for i, plan in enumerate(plans):
        axes.plot([plan.per_chip.hbm / GIB] * 2, [i - 0.4, i + 0.4], color="#cc3311", linewidth=2)
    axes.plot([], [], color="#cc3311", linewidth=2, label="HBM")
    axes.invert_yaxis()
    axes.set_xlabel("GiB a chip")
    case = plans[0].case
    kind = case.quantize or case.dtype
    axes.set_title(f"{case.model} {kind}, batch {case.batch:,}, context {case.context:,}", loc="left")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def _part(per_chip: PerChip, part: str) -> int:
    if part == "other":
        return max(0, per_chip.peak - per_chip.weights - per_chip.cache - per_chip.temporaries)
    return getattr(per_chip, part)
