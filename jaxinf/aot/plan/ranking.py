"""Which mesh is best, and why."""

from __future__ import annotations

from jaxinf.aot.plan import arithmetic, limits
from jaxinf.aot.plan import sizes as parts
from jaxinf.aot.plan.types import Case, Found, Ranked, Sizes
from jaxinf.aot.slices import Slice
from pallas_kernels.errors import InputError
from sharding import meshes

SHOWN = 8
"""Meshes of a ranking that a plan keeps."""


def ranked(case: Case, where: Slice) -> list[Found]:
    """All meshes over the slice that divide the model: those that fit first, each part by the time of a step.

    Raises:
      InputError: none divides it.
    """
    found = [arithmetic.found(case, where, sizes) for sizes in arithmetic.all_meshes(case, where)]
    if not found:
        raise InputError(
            f"no mesh over the {where.devices} devices of {where.name} divides {case.model}: "
            f"{_reasons(case, where)}"
        )
    return sorted(found, key=lambda f: key(f))


def key(found: Found) -> tuple:
    """Sorts the better first."""
    if found.per_chip.free < 0:
        return (1, found.per_chip.peak, 0.0, 0)
    split = sum(size > 1 for size in found.sizes.values())
    return (0, round(arithmetic.decode_seconds(found), 7), round(arithmetic.prefill_seconds(found), 5), split)


def _reasons(case: Case, where: Slice) -> str:
    reasons = []
    for axis in ("tensor", "pipeline"):
        try:
            arithmetic.check(case, where, {axis: where.devices})
        except InputError as error:
            reasons.append(str(error))
    return "; ".join(reasons) or f"batch={case.batch} is too small to be split"


def explained(case: Case, best: Found, others: list[Found]) -> tuple[Ranked, ...]:
    """The ranking with reasons."""
    lines = [_line(best, "")]
    lines += [_line(other, _why(case, best, other)) for other in others]
    return tuple(lines[:SHOWN])


def _line(found: Found, why: str) -> Ranked:
    return Ranked(
        mesh=meshes.describe(found.sizes),
        fits=found.per_chip.free >= 0,
        peak=found.per_chip.peak,
        step_seconds=arithmetic.decode_seconds(found),
        prefill_seconds=arithmetic.prefill_seconds(found),
        why=why,
    )


def _why(case: Case, best: Found, other: Found) -> str:
    if other.per_chip.free < 0 <= best.per_chip.free:
        return f"does not fit: {-other.per_chip.free / (1 << 30):.1f} GiB too much"
    if other.ticks > 1.5 * best.ticks:
        return f"stages wait for each other: {other.ticks:.1f} times as long"
    differences = {
        "HBM": (other.decode.hbm - best.decode.hbm, _hbm_reason(case, best.sizes, other.sizes)),
        "MXU": (other.decode.mxu - best.decode.mxu, "more products a chip"),
        "ICI": (other.decode.ici - best.decode.ici, "more to tell each other"),
    }
    name, (most, reason) = max(differences.items(), key=lambda item: item[1][0])
    if most <= 0:
        return "a longer prefill" if other.prefill.roofline > best.prefill.roofline else "the same, more split"
    return f"{reason}: {name} takes {most * 1e3:.2f} ms more"


def _hbm_reason(case: Case, best: Sizes, other: Sizes) -> str:
    def weights(sizes: Sizes) -> int:
        return sum(w.bytes for w in parts.weights(case, sizes))

    def cache(sizes: Sizes) -> int:
        return parts.cache_bytes(case, sizes)

    more_weights, more_cache = weights(other) - weights(best), cache(other) - cache(best)
    if more_weights >= more_cache:
        return f"{weights(other) / max(1, weights(best)):.1f} times the weights to read a chip"
    return f"{cache(other) / max(1, cache(best)):.1f} times the cache to read a chip"


__all__ = ["explained", "key", "limits", "ranked"]
