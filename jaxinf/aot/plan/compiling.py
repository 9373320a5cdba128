"""The compiled part of a plan: memory and collectives as the compiler accounts for them, times of its schedules."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinf.aot import jobs, programs, topology, wires
from jaxinf.aot.collectives import Collective
from jaxinf.aot.job import Job
from jaxinf.aot.plan import arithmetic, limits
from jaxinf.aot.plan.types import Case, Found, PerChip, Plan, Ranked, Sizes, Terms, Use
from jaxinf.aot.report import Report
from jaxinf.aot.slices import Slice
from jaxinf.aot.static import Timeline
from jaxinf.core import from_record, to_record
from jaxinf.models import ModelSpec
from pallas_kernels.named import Call
from sharding import meshes
from sharding.collectives import AXES

WITNESS = "static analysis of the TPU compiler's schedule"
TIMEOUT = 1800.0
WORKERS = 2
NEW_TOKENS = 64
"""Of the program whose memory is read; more of them take a few bytes each."""


def program(spec: Any, **arguments: Any) -> Call:
    """A program by JSON arguments, for the compiler's process."""
    return programs.built(from_record(ModelSpec, spec), **arguments).call


@dataclass(frozen=True)
class Tried:
    """A mesh of which the decode step was compiled.

    Attributes:
      report: None where the compiler refused it; `error` says why, `needed` the bytes where there were too many.
    """

    found: Found
    report: Report | None
    error: str = ""
    needed: int = 0

    @property
    def seconds(self) -> float:
        if self.report is None or self.report.timeline is None:
            return math.inf
        return max(self.report.timeline.seconds, self.found.decode.roofline * self.found.ticks)


def compiled(
    case: Case, where: Slice, plan: Plan, candidates: Sequence[Found], progress: Callable[[str], None]
) -> Plan:
    """The plan with the compiler's figures in place of arithmetic, where it has them.

    Args:
      plan: by arithmetic, of the first candidate.
      candidates: meshes to compile decode steps of; the fastest one that fits is taken.
    """
    began = time.monotonic()
    todo = [c for c in candidates if c.per_chip.free >= 0] or list(candidates[:1])
    progress(f"compiling for {where.name}: {', '.join(meshes.describe(c.sizes) for c in todo)}")
    with jobs.Pool(where.topology, workers=WORKERS, timeout=TIMEOUT) as pool:
        # Of the mesh that will most likely win the whole program too, which takes longest, beside the others.
        steps = [_job(case, where, c.sizes, "decode") for c in todo]
        whole, *outcomes = _compile([_job(case, where, todo[0].sizes, "generate"), *steps], pool)
        tried = [_tried(found, outcome) for found, outcome in zip(todo, outcomes, strict=True)]
        best = min(tried, key=lambda t: (t.report is None, t.seconds))
        if best.found is not todo[0]:
            progress(f"compiling the whole program on {meshes.describe(best.found.sizes)}")
            (whole,) = _compile([_job(case, where, best.found.sizes, "generate")], pool)
    made = _with_mesh(plan, case, where, best.found)
    made = dataclasses.replace(made, ranking=_ranking(made, tried))
    if best.report is not None:
        made = _with_decode(made, best)
    elif not best.needed:
        note = f"the compiler did not take the decode step, whose time is arithmetic ({best.error})"
        made = dataclasses.replace(made, notes=(*made.notes, note))
    made = _with_whole(made, best.found, whole)
    taken = time.monotonic() - began
    return dataclasses.replace(made, compiler=topology.compiler(), compile_seconds=taken)


def _job(case: Case, where: Slice, sizes: Sizes, part: str) -> Job:
    arguments: dict[str, Any] = dict(
        spec=to_record(case.spec),
        chip=where.topology,
        mesh=dict(sizes),
        part=part,
        batch=case.batch,
        prompt=case.prompt,
        capacity=case.context,
        dtype=case.dtype,
        quantize=case.quantize,
        cache=case.cache,
    )
    if part == "decode":
        arguments["held"] = case.context - 1
    else:
        piece = arithmetic.piece(case, sizes)
        arguments |= dict(new_tokens=_new_tokens(case), piece=piece, held=_held(case, piece))
    return Job("jaxinf.aot.plan.compiling:program", arguments, "program")


def _new_tokens(case: Case) -> int:
    return max(2, min(NEW_TOKENS, case.context - case.prompt))


def _held(case: Case, piece: int) -> int:
    """What the cache is said to hold, so that the first trip over a prompt's later pieces is an average one."""
    later = max(0, math.ceil(case.prompt / piece) - 1)
    return max(0, (later - 1) * piece // 2)


def _compile(todo: Iterable[Job], pool: jobs.Pool) -> list[jobs.Outcome]:
    """Outcomes in the order of the jobs."""
    todo = list(todo)
    found = {id(o.job): o for o in pool.run(todo)}
    return [found[id(job)] for job in todo]


def _tried(found: Found, outcome: jobs.Outcome) -> Tried:
    if outcome.report is not None:
        return Tried(found, outcome.report)
    return Tried(found, None, outcome.error, _needed(outcome))


def _needed(outcome: jobs.Outcome) -> int:
    """Bytes that a program which was too large needs."""
    said = re.search(r"needs [^(]*\(([\d,]+) bytes\) of HBM", outcome.error) if outcome.kind == "hbm" else None
    return int(said[1].replace(",", "")) if said else 0


def _with_mesh(plan: Plan, case: Case, where: Slice, found: Found) -> Plan:
    """The plan of another mesh, by arithmetic still."""
    from jaxinf.aot.plan import planner

    if plan.mesh == meshes.describe(found.sizes):
        return plan
    return dataclasses.replace(planner.by_arithmetic(case, where, found), ranking=plan.ranking)


def _with_decode(plan: Plan, best: Tried) -> Plan:
    report = best.report
    assert report is not None
    line = report.timeline
    assert line is not None
    uses = used(report.collectives, plan.where, best.found.sizes)
    terms = dataclasses.replace(best.found.decode, ici=line.ici_seconds)
    batch = plan.case.batch
    decode = dataclasses.replace(
        plan.decode,
        step_seconds=best.seconds,
        tokens_per_second=batch / best.seconds,
        bound=_bound(line, terms),
        terms=terms,
        witness=WITNESS,
    )
    return dataclasses.replace(plan, decode=decode, collectives=uses, notes=(*plan.notes[1:], *_doubts(line)))


def _with_whole(plan: Plan, found: Found, outcome: jobs.Outcome) -> Plan:
    """Memory and prefill from the whole program."""
    case, where = plan.case, plan.where
    report = outcome.report
    if report is None:
        needed = _needed(outcome)
        if not needed:
            note = f"the compiler did not take the whole program ({outcome.error}); its memory is an estimate"
            return dataclasses.replace(plan, notes=(*plan.notes, note))
        per_device = dataclasses.replace(found.per_chip, peak=max(needed, found.per_chip.peak))
        per_device = dataclasses.replace(
            per_device, temporaries=max(0, per_device.peak - per_device.weights - per_device.cache)
        )
        return _refitted(plan, found, per_device)
    memory = report.memory
    per_device = PerChip(
        weights=found.per_chip.weights,
        cache=found.per_chip.cache,
        temporaries=memory.temporaries,
        peak=memory.peak,
        hbm=where.memory,
    )
    plan = _refitted(plan, found, per_device)
    line = report.timeline
    if line is None:
        return plan
    seconds = max(prefill_seconds(line, case, arithmetic.piece(case, found.sizes)), found.prefill.roofline)
    prefill = dataclasses.replace(
        plan.prefill,
        seconds=seconds,
        tokens_per_second=case.batch * case.prompt / seconds,
        bound=_bound(line, found.prefill),
        witness=WITNESS,
    )
    return dataclasses.replace(plan, prefill=prefill)


def prefill_seconds(line: Timeline, case: Case, piece: int) -> float:
    """Of the program that generates: what comes before its loop over tokens, with all trips over later pieces."""
    loops = line.endless
    if not loops:
        return line.seconds
    later = math.ceil(case.prompt / piece) - 1
    before = loops[-1].began
    if later > 0 and len(loops) > 1:
        before += (later - 1) * loops[0].seconds
    return before


def _refitted(plan: Plan, found: Found, per_device: PerChip) -> Plan:
    """The plan with other memory, and what follows from it."""
    from jaxinf.aot.plan import planner

    case, where = plan.case, plan.where
    fits = per_device.free >= 0
    known = (case, per_device)
    batch, context = limits.largest(case, where, found.sizes, known)
    return dataclasses.replace(
        plan,
        per_chip=planner.per_chip(where, per_device),
        fits=fits,
        largest_batch=batch,
        largest_context=context,
        remedy="" if fits else limits.remedy(case, where, found.sizes, known),
    )


def _bound(line: Timeline, terms: Terms) -> str:
    names = {"core": "MXU" if terms.mxu > 0.5 * line.core_seconds else "core"}
    name, _, rest = line.bound.partition(" ")
    return f"{names.get(name, name)} {rest}".strip()


def _doubts(line: Timeline) -> tuple[str, ...]:
    """What the static model could not follow."""
    doubts = []
    if line.unknown:
        doubts.append(f"kernels that could not be followed, whose time is too low: {', '.join(line.unknown[:5])}")
    if line.missing:
        doubts.append(f"operations without a schedule, taken as no time: {', '.join(line.missing[:5])}")
    return tuple(doubts)


def used(found: Sequence[Collective], where: Slice, sizes: Mapping[str, int]) -> tuple[Use, ...]:
    """A program's collectives, equal ones together, with the axes that they run along."""
    counts: dict[tuple[str, str, int, int], int] = defaultdict(int)
    for c in found:
        counts[axes_of(c.group, sizes), c.kind, c.bytes, c.chips] += c.times
    ways = wires.ways(where, sizes)
    uses = []
    for (axes, kind, size, chips), times in counts.items():
        way = tuple(w for axis in axes.split("+") for w in ways.get(axis, ()))
        each = wires.seconds(kind, size, wires.part(way, chips))
        sent = Collective("", kind, size, chips).sent
        uses.append(Use(axes, kind, size, chips, times, times * sent, times * each))
    return tuple(sorted(uses, key=lambda u: -u.seconds))


def axes_of(group: Sequence[int], sizes: Mapping[str, int]) -> str:
    """The mesh's axes along which devices of a group differ, such as "data+tensor"."""
    varying, stride = [], 1
    for axis in reversed(AXES):
        size = sizes.get(axis, 1)
        if len({at // stride % size for at in group}) > 1:
            varying.append(axis)
        stride *= size
    return "+".join(reversed(varying))


def _ranking(plan: Plan, tried: Sequence[Tried]) -> tuple[Ranked, ...]:
    """The ranking by arithmetic, with the compiled meshes first, by their own times."""
    if not plan.ranking:
        return ()
    by_mesh = {r.mesh: r for r in plan.ranking}
    best = min((t.seconds for t in tried), default=math.inf)
    lines = []
    for t in sorted(tried, key=lambda t: t.seconds):
        old = by_mesh.pop(meshes.describe(t.found.sizes), None)
        if old is None:
            continue
        if t.report is None:
            lines.append(dataclasses.replace(old, fits=False, why=f"the compiler refuses it: {t.error[:80]}"))
            continue
        why = "" if t.seconds == best else f"{(t.seconds - best) * 1e3:.2f} ms more when compiled"
        peak = max(old.peak, t.report.memory.peak)
        lines.append(dataclasses.replace(old, step_seconds=t.seconds, peak=peak, why=why, witness=WITNESS))
    return (*lines, *by_mesh.values())
