"""`plan`: from a case and a slice to a plan, through the compiler where there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxinf.aot import topology
from jaxinf.aot.plan import arithmetic, limits, ranking
from jaxinf.aot.plan.types import Case, Decode, Found, PerChip, Plan, Prefill, Use
from jaxinf.aot.slices import Slice, find
from pallas_kernels.errors import InputError
from sharding import meshes

NEAR = 1.25
"""Times the step of the best mesh by arithmetic: a slower one is not expected to win when it is compiled."""
Progress = Callable[[str], None]
"""Told in a few words what is being done."""

_ALONE = (
    "no compiler was asked: temporaries are an estimate of activations, and times are peak rates and serial "
    "collectives, which real programs do not reach"
)


def plan(
    case: Case,
    tpu: str | Slice,
    *,
    mesh: str = "auto",
    compiled: bool | None = None,
    tries: int = 2,
    progress: Progress = lambda text: None,
) -> Plan:
    """Plans a case on a slice.

    Args:
      tpu: "v5e-16", "v6e:2x4", ...
      mesh: "auto", or sizes such as "data=2,tensor=8".
      compiled: whether to ask the TPU compiler; None: if it is installed.
      tries: with "auto", how many of the best meshes are compiled at most: those that are `NEAR` the best.

    Raises:
      InputError: an unknown slice; a mesh that does not divide it, the model or the context.
      UnsupportedError: `compiled` without a compiler.
    """
    limits.positive(case)
    where = find(tpu) if isinstance(tpu, str) else tpu
    if compiled:
        topology.compiler()
    ask = topology.available() if compiled is None else compiled
    if mesh == "auto":
        candidates = ranking.ranked(case, where)
    else:
        candidates = [arithmetic.found(case, where, meshes.parse(mesh))]
    best, rest = candidates[0], candidates[1:]
    made = by_arithmetic(case, where, best)
    if mesh == "auto":
        made = dataclasses.replace(made, ranking=ranking.explained(case, best, rest))
    if not ask:
        return made
    from jaxinf.aot.plan import compiling

    limit = NEAR * arithmetic.decode_seconds(best)
    near = [c for c in candidates[: max(1, tries)] if c is best or arithmetic.decode_seconds(c) <= limit]
    return compiling.compiled(case, where, made, near, progress)


def by_arithmetic(case: Case, where: Slice, found: Found) -> Plan:
    """A plan of one mesh without the compiler."""
    step, first = arithmetic.decode_seconds(found), arithmetic.prefill_seconds(found)
    batch, context = limits.largest(case, where, found.sizes)
    fits = found.per_chip.free >= 0
    return Plan(
        case=case,
        where=where,
        mesh=meshes.describe(found.sizes),
        fits=fits,
        per_chip=per_chip(where, found.per_chip),
        decode=Decode(step, case.batch / step, found.decode.bound, found.decode),
        prefill=Prefill(first, case.batch * case.prompt / first, found.prefill.bound, found.prefill),
        collectives=found.collectives,
        prefill_collectives=found.prefill_collectives,
        largest_batch=batch,
        largest_context=context,
        remedy="" if fits else limits.remedy(case, where, found.sizes),
        notes=(_ALONE, *notes(case)),
    )


def per_chip(where: Slice, device: PerChip) -> PerChip:
    """A device's bytes as the chip's, of which it may be a part."""
    return PerChip(**{name: size * where.facts.devices for name, size in vars(device).items()})


def notes(case: Case) -> tuple[str, ...]:
    """What figures of this case leave open."""
    found = [f"a decode step is that of rows of {case.context:,} tokens each; shorter rows are faster"]
    if any(hasattr(layer.ffn, "experts") for layer in case.spec.layers()):
        found.append("tokens are taken to choose experts evenly")
    return tuple(found)


def compare(
    case: Case,
    tpus: Sequence[str],
    *,
    mesh: str = "auto",
    compiled: bool | None = None,
    progress: Progress = lambda text: None,
) -> tuple[Plan, ...]:
    """Plans of the same case on several slices. Slices that no mesh divides raise, as `plan`."""
    if len(set(tpus)) < len(tpus):
        raise InputError(f"tpus={','.join(tpus)} names a slice twice; name each once")
    return tuple(plan(case, tpu, mesh=mesh, compiled=compiled, progress=progress) for tpu in tpus)


def uses_seconds(uses: Sequence[Use]) -> float:
    return sum(u.seconds for u in uses)
