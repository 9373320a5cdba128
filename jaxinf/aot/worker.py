"""The process that compiles: reads jobs from stdin, a JSON line each, and answers each with a line.

It is a process of its own since libtpu reads its options when it is loaded, and since a fault of the compiler ends
the process it is in. `jaxinf.aot.jobs` starts it.
"""

import json
import os
import shutil
import sys
from typing import Any

import jax
import numpy as np

from jaxinf.aot import collectives, lowering, memory, topology, wires
from jaxinf.aot.failures import explain, kind
from jaxinf.aot.hlo import Instruction
from jaxinf.aot.job import Job, Steered
from jaxinf.aot.report import Report
from jaxinf.aot.static import Estimate, Operation, Timeline, dump, operands, timeline
from jaxinf.aot.static.machine import machine
from jaxinf.core.record import to_record
from pallas_kernels.chips import CHIPS
from pallas_kernels.named import Call


def main() -> None:
    setup = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libtpu and the jobs print goes to stderr
    sys.path[:0] = setup["paths"]
    for line in sys.stdin:
        task = json.loads(line)
        answer = _answer(Job(task["function"], task["arguments"], task["static"]), setup, task["keep"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(job: Job, setup: dict[str, Any], keep: str | None) -> dict[str, Any]:
    try:
        return {"report": to_record(compile_job(job, setup["chip"], setup["dumps"], keep))}
    except Exception as error:
        known = explain(error) or error
        message = (
            str(known) if known is not error or kind(error) != "defect" else f"{type(error).__name__}: {error}"
        )
        return {"kind": kind(known), "error": message[:2000]}


def compile_job(job: Job, chip: str, dumps: str | None = None, keep: str | None = None) -> Report:
    """Compiles a job for a slice in this process.

    Args:
      dumps: the folder that libtpu was told to write its dumps to; None: no static model.
      keep: where to move them; None: they are removed.
    """
    call = job.make(topology.devices(chip))
    mesh, estimate, whole = _mesh(call), None, None
    try:
        compiled = lowering.lower(call.fn, *call.args, chip=chip, mesh=mesh, donate=call.donate)
        if dumps is not None and job.static == "operations":
            estimate = _estimate(compiled, call, dumps)
        elif dumps is not None and job.static == "program":
            whole = _timeline(compiled, call, dumps, mesh)
    finally:
        if dumps is not None:
            _clear(dumps, keep)
    cost = compiled.cost
    return Report(
        chip=chip,
        compiler=topology.compiler(),
        compile_seconds=compiled.compile_seconds,
        memory=memory.of(compiled.executable),
        collectives=compiled.collectives,
        flops=float(cost.get("flops", 0.0)),
        bytes=float(cost.get("bytes accessed", 0.0)),
        estimate=estimate,
        timeline=whole,
    )


def _mesh(call: Call) -> Any:
    """The mesh that the arguments are placed on, if they are."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(call.args))
    return next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)


def _estimate(compiled: lowering.Compiled, call: Call, dumps: str) -> Estimate:
    where = topology.find(compiled.chip)
    operations, prefetched = _operations(compiled, call, dumps)
    stated = bool(call.work.flops or call.work.bytes)
    return Estimate(
        chip=where.chip.name,
        cores=compiled.cores,
        flops=float(call.work.flops if stated else compiled.cost.get("flops", 0.0)),
        bytes=float(call.work.bytes if stated else compiled.cost.get("bytes accessed", 0.0)),
        dtype=call.work.dtype,
        stated=stated,
        operations=operations,
        prefetched=prefetched,
    )


def _operations(compiled: lowering.Compiled, call: Call, dumps: str) -> tuple[tuple[Operation, ...], int]:
    flat = [_value(leaf) for leaf in jax.tree.leaves(call.args)]
    kernels = operands.of_kernels(compiled.jaxpr, flat)
    chip = topology.find(compiled.chip).chip
    return dump.operations(dumps, machine(chip), kernels, compiled.cores)


def _value(leaf: Any) -> np.ndarray | None:
    """Of an argument, where it is known."""
    return leaf if isinstance(leaf, np.ndarray) else leaf.value if isinstance(leaf, Steered) else None


def _timeline(compiled: lowering.Compiled, call: Call, dumps: str, mesh: Any) -> Timeline:
    where = topology.find(compiled.chip)
    operations, _ = _operations(compiled, call, dumps)
    places = [] if mesh is None else [_place(device) for device in mesh.devices.flat]

    def collective(instruction: Instruction) -> float:
        found = collectives.one(instruction)
        return wires.seconds(found.kind, found.bytes, wires.between(where, [places[i] for i in found.group]))

    return timeline(
        compiled.text,
        {o.name: o for o in operations},
        clock=where.chip.clock,
        bandwidth=where.chip.bandwidth * compiled.cores / where.chip.cores,
        collective=collective,
    )


def _place(device: Any) -> tuple[int, ...]:
    """Where a device stands: its chip's coordinates along the slice's axes, and which of the chip's it is."""
    axes = len(topology.find(_CHIPS[device.device_kind]).shape)
    return (*device.coords[:axes], getattr(device, "core_on_chip", 0))


_CHIPS = {kind: name for name, chip in CHIPS.items() for kind in chip.kinds}


def _clear(dumps: str, keep: str | None) -> None:
    if keep is not None:
        os.makedirs(keep, exist_ok=True)
    for name in os.listdir(dumps):
        path = os.path.join(dumps, name)
        if keep is not None:
            shutil.move(path, os.path.join(keep, name))
        elif os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)


if __name__ == "__main__":
    main()
