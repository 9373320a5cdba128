"""From a folder of the compiler's dumps to an `Estimate`."""

import os
import re
from collections.abc import Sequence

from jaxinf.aot import hlo as hlo_text
from jaxinf.aot.shapes import shape_bytes
from jaxinf.aot.static import emulator
from jaxinf.aot.static.bundles import Program, programs
from jaxinf.aot.static.machine import Machine
from jaxinf.aot.static.operands import Kernel, Operand, Operands, pack
from jaxinf.aot.static.report import Loop, Occupancy, Operation, Region, Span
from jaxinf.aot.static.timeline import is_collective

PASSES = "(packed-bundles-post-ra|pre-delay|final_hlo|static-bundle-profile)"
_SHORT = 0.01  # of an operation's cycles: shorter spans are left out


def flags(folder: str) -> str:
    """Options for LIBTPU_INIT_ARGS that make the compiler write what `operations` reads."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true "
        f"--xla_jf_emit_annotations=true --xla_jf_dump_llo_pass_label_regex={PASSES}"
    )


def operations(
    folder: str, machine: Machine, kernels: Sequence[Kernel], cores: int
) -> tuple[tuple[Operation, ...], int]:
    """The operations that were dumped in `folder`, and the bytes that XLA's own asynchronous copies move.

    Collectives are left out: the links between chips are not modelled.

    Args:
      kernels: what is known of each Pallas kernel's operands, in program order.
      cores: that the program runs on.
    """
    hlo, profile = _read(folder, "TLP-hlo.txt"), _read(folder, "hlo-static-bundle-profile.txt")
    calls = _kernel_calls(hlo)
    known = _matched(calls, kernels, hlo)
    told = _collectives(hlo)
    layouts = dict(re.findall(r"^\s*(?:ROOT )?%(\S+) = \(?[\w\[\], ]+\]?(\{[^}]*\})?", hlo, re.M))
    found = []
    for program in programs(folder, machine):
        if program.name in told:
            continue
        words, vmem = {}, 0
        if program.name in calls:
            words = _words(calls[program.name], known.get(program.name, []), layouts, hlo)
            vmem = _vmem(profile, program.name)
        found.append(_operation(program, words, cores, vmem, program.name in calls))
    copies = re.finditer(r" = \((\w+\[[\d,]*\]).*? (?:copy|slice|dynamic-slice)-start\(", hlo)
    return tuple(found), sum(shape_bytes(m[1]) for m in copies)


def _read(folder: str, ending: str) -> str:
    name = next((f for f in os.listdir(folder) if f.endswith(ending)), None)
    if name is None:
        return ""
    with open(os.path.join(folder, name)) as stream:
        return stream.read()


def _kernel_calls(hlo: str) -> dict[str, list[str]]:
    """Name of each Pallas kernel's operation -> names of its operands."""
    pattern = r'^\s*(?:ROOT )?%(\S+) = .*? custom-call\((.*?)\), custom_call_target="tpu_custom_call"'
    calls = {}
    for m in re.finditer(pattern, hlo, re.M):
        calls[m[1]] = [re.sub(r"/\*.*?\*/", "", name).strip().lstrip("%") for name in m[2].split(", ")]
    return calls


def _matched(calls: dict[str, list[str]], kernels: Sequence[Kernel], hlo: str) -> dict[str, Operands]:
    """What is known of the operands of each kernel's operation: by name and shapes, equal ones in program order."""
    found, used = {}, set()
    for name in calls:
        line = re.search(
            rf"%{re.escape(name)} = .*? custom-call\(.*?operand_layout_constraints=\{{(.*?\}})\}}", hlo
        )
        shapes = tuple(re.findall(r"\w+\[[\d,]*\]", line[1])) if line else ()
        alike = [i for i, k in enumerate(kernels) if k.shapes[: len(shapes)] == shapes]
        same = [i for i in alike if name.startswith(kernels[i].name)] or alike
        chosen = next((i for i in same if i not in used), same[0] if same else None)
        if chosen is None and len(kernels) == len(calls):
            chosen = list(calls).index(name)
        if chosen is not None:
            used.add(chosen)
            found[name] = kernels[chosen].operands
    return found


def _collectives(text: str) -> set[str]:
    """Names of the operations that talk to other chips, fusions around them included."""
    computations, _ = hlo_text.computations(text)
    return {
        i.name
        for lines in computations.values()
        for i in hlo_text.instructions(lines)
        if is_collective(i, computations)
    }


def _words(names: Sequence[str], known: Operands, layouts: dict[str, str], hlo: str) -> dict[int, list[int]]:
    words = {}
    for i, operand in enumerate(known):
        if isinstance(operand, Operand):
            words[i] = pack(operand, layouts.get(names[i], "") if i < len(names) else "")
    for i, name in enumerate(names):
        if i not in words:  # a constant that the compiler folded
            m = re.search(rf"%{re.escape(name)} = s32\[1?\]\S* constant\(\{{?(-?\d+)\}}?\)", hlo)
            if m:
                words[i] = [int(m[1])]
    return words


def _vmem(profile: str, name: str) -> int:
    for part in profile.split("HLO: %"):
        if part.startswith(name + " = "):
            m = re.search(r'"used_scoped_memory_configs":(\[.*?\])', part)
            sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', m[1]) if m else []
            return sum(map(int, sizes))
    return 0


def _operation(program: Program, words: dict, cores: int, vmem: int, kernel: bool) -> Operation:
    runs = [emulator.run(program, words)]
    if program.by_core and cores > 1:
        runs.append(emulator.run(program, words, 1, runs[0].memory.shared))
    slow = max(runs, key=lambda r: r.time)
    times = cores // len(runs)  # what does not ask for its core does the same on each
    traffic = [r.memory.traffic for r in runs]
    loops, regions = _structure(program, slow)
    first = min((loop.start for loop in loops), default=0)
    return Operation(
        name=program.name,
        kernel=kernel,
        bundles=program.n,
        instructions=program.final,
        cycles=slow.cycles,
        time=slow.time,
        read=times * sum(t.read for t in traffic),
        written=times * sum(t.written for t in traffic),
        copies=times * sum(t.copies for t in traffic),
        pieces=times * sum(t.pieces for t in traffic),
        steps=int(max((loop.trips for loop in loops if loop.start == first), default=1)),
        macs=times * sum(m * n for r in runs for m, n in zip(program.macs, r.count, strict=True)),
        vmem=vmem,
        loops=loops,
        regions=regions,
        spans=_spans(program, slow),
        unknown_branches=len(slow.unknown),
        unknown_copies=sum(t.unknown for t in traffic),
        truncated=any(r.truncated for r in runs),
        pending=times * sum(r.memory.pending for r in runs),
        awaited=times * sum(t.awaited for t in traffic),
    )


def _structure(program: Program, run: emulator.Run) -> tuple[tuple[Loop, ...], tuple[Region, ...]]:
    loops, regions = [], []
    for bundle, branch in program.branches.items():
        after, seen, taken = bundle + program.machine.delay + 1, run.seen.get(bundle, 0), run.taken.get(bundle, 0)
        known = bundle not in run.unknown
        if branch.target <= bundle:
            trips = seen / max(1, seen - taken)
            loops.append(Loop(branch.target, min(program.n, after), trips, known))
        else:
            fraction = 1 - taken / seen if seen else None
            regions.append(Region(branch.region, after, branch.target, seen, fraction, known))
    return tuple(sorted(loops, key=lambda l: l.start)), tuple(sorted(regions, key=lambda r: r.start))


def _spans(program: Program, run: emulator.Run) -> tuple[Span, ...]:
    spans, start = [], 0
    for end in range(1, program.n + 1):
        if end == program.n or run.count[end] != run.count[start]:
            share = (end - start) * run.count[start] / max(1, run.cycles)
            if share >= _SHORT:
                spans.append(_span(program, start, end, run.count[start], share))
            start = end
    return tuple(sorted(spans, key=lambda s: -s.share))


def _span(program: Program, start: int, end: int, count: int, share: float) -> Span:
    rows = program.use.rows[start:end]

    def total(name: str) -> int:
        return sum(row.get(name, 0) for row in rows)

    def busy(name: str) -> float:
        slots = program.use.capacity.get(name, 0) * len(rows)
        return total(name) / slots if slots else 0.0

    names = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
    empty = sum(not instructions for instructions in program.bundles[start:end]) / (end - start)
    units = Occupancy(*map(busy, names))
    return Span(start, end, count, share, units, empty, total("VSTORE:SPILL"), total("VLOAD:FILL"))
