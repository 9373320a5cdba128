"""Searches an op's block sizes through the TPU compiler, and keeps what it finds in the tuned tables."""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
from jaxinf.aot import cases, lowering, topology
from jaxinf.aot.job import Job, case_job
from jaxinf.aot.jobs import Pool
from pallas_kernels import chips, tuned
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.named import Call

TIE = 0.03
"""Times closer than this share are taken as equal: the model is no better than that."""
BUDGET = 60
Blocks = Mapping[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """Block sizes and what the static model says of them.

    Attributes:
      vmem: bytes, the op's own estimate.
      seconds: None where it does not compile or the time is not to be believed; `error` says why.
    """

    blocks: Blocks
    vmem: int
    seconds: float | None = None
    ratio: float = 0.0
    bound: str = ""
    copies: int = 0
    error: str = ""


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
      candidates: how many block sizes were there to choose from.
      trials: those tried, the fastest first, the refused last.
      skipped: those that need more VMEM than a kernel may ask for, with `vmem`.
      heuristic: what the op takes without a table.
    """

    op: str
    case: str
    chip: str
    bucket: str
    compiler: str
    candidates: int
    trials: tuple[Trial, ...]
    skipped: tuple[Trial, ...]
    heuristic: Blocks

    @property
    def best(self) -> Trial | None:
        """The one that takes least VMEM of those as fast as the fastest."""
        timed = [t for t in self.trials if t.seconds is not None]
        if not timed:
            return None
        limit = (1 + TIE) * min(t.seconds or 0.0 for t in timed)
        return min((t for t in timed if (t.seconds or 0.0) <= limit), key=lambda t: (t.vmem, t.seconds))

    @property
    def heuristic_seconds(self) -> float | None:
        """Time of the heuristic's choice."""
        return next((t.seconds for t in self.trials if t.blocks == self.heuristic), None)

    @property
    def pays(self) -> bool:
        """Whether the best is so much faster than the heuristic's choice that a table should say so."""
        best, heuristic = self.best, self.heuristic_seconds
        if best is None or best.seconds is None:
            return False
        return heuristic is None or heuristic > (1 + TIE) * best.seconds

    def entry(self) -> dict[str, Any]:
        """What a tuned table keeps.

        Raises:
          UnsupportedError: no block sizes were found that compile.
        """
        best = self.best
        if best is None or best.seconds is None:
            raise UnsupportedError(f"no block sizes of {self.op} compile for {self.case} on a {self.chip}.")
        today = datetime.date.today().isoformat()
        return {
            "blocks": dict(best.blocks),
            "ms": round(best.seconds * 1e3, 5),
            "case": self.case,
            "compiler": self.compiler,
            "date": today,
        }


def problem_of(op: str, call: Call, chip: str) -> Any:
    """The op's static facts of a call, as its block sizes are chosen by.

    Raises:
      UnsupportedError: the call takes no kernel whose block sizes can be chosen.
    """
    jax.clear_caches()  # a kernel that jit has traced before chooses nothing
    with lowering.use(topology.mesh(chip)), tuned.observe() as choices:
        jax.eval_shape(call.fn, *call.args)
    found = [choice.problem for choice in choices if choice.op == op]
    if not found:
        raise UnsupportedError(f"this call of {op} takes no kernel with block sizes to choose.")
    return found[0]


def buckets(op: str, chip: str, names: Iterable[str]) -> dict[str, str]:
    """The tuned tables' keys of named cases, each with the first case in it."""
    module, found = cases.blocks_of(op), {}
    for name in names:
        found.setdefault(module.bucket(problem_of(op, cases.call(op, name), chip)), name)
    return found


def tune(
    op: str, case: str, chip: str, *, budget: int = BUDGET, workers: int = 1, progress: Progress | None = None
) -> Search:
    """Searches the block sizes of a named case.

    Raises:
      InputError: no such op, case or chip.
      UnsupportedError: libtpu is not installed; the op has no block sizes.
    """
    call = cases.call(op, case)

    def job(blocks: Blocks) -> Job:
        return case_job(op, case, blocks=blocks)

    return search(op, case, call, job, chip, budget=budget, workers=workers, progress=progress)


def search(
    op: str,
    name: str,
    call: Call,
    job: Callable[[Blocks], Job],
    chip: str,
    *,
    budget: int = BUDGET,
    workers: int = 1,
    progress: Progress | None = None,
    pool: Pool | None = None,
) -> Search:
    """Searches the block sizes of any call of an op; `job(blocks)` names the call with these.

    pool: processes for that chip, where there are some (`workers` then counts for nothing).

    Up to `budget` candidates are compiled: all of them if there are no more, else those around the heuristic's
    choice, then around the best found; a quarter of them is drawn from all others, for the hills beyond a valley.
    """
    module, where = cases.blocks_of(op), chips.find(chip)
    problem = problem_of(op, call, chip)
    heuristic = _fields(module.heuristic(problem, where))
    candidates = {_key(heuristic): heuristic}
    candidates |= {_key(c): c for c in map(_fields, module.candidates(problem, where))}
    trials: dict[tuple, Trial] = {}
    skipped = []
    for key, blocks in list(candidates.items()):
        vmem = module.vmem_bytes(problem, module.Blocks(**blocks))
        if vmem > tuned.budget(where):
            skipped.append(Trial(blocks, vmem))
            del candidates[key]
    most = min(budget, len(candidates))
    report = progress or (lambda done, total: None)
    report(0, most)
    pick = _Walk(candidates, heuristic)
    with contextlib.nullcontext(pool) if pool else Pool(chip, workers=workers) as compilers:
        while len(trials) < most:
            whole = len(candidates) == most
            batch = pick.next(trials, most if whole else min(most - len(trials), max(8, 4 * workers)))
            jobs = {id(j): (blocks, j) for blocks in batch for j in [job(blocks)]}
            for outcome in compilers.run([j for _, j in jobs.values()]):
                blocks = jobs[id(outcome.job)][0]
                vmem = module.vmem_bytes(problem, module.Blocks(**blocks))
                trials[_key(blocks)] = _trial(blocks, vmem, outcome)
                report(len(trials), most)
    ranked = sorted(trials.values(), key=lambda t: (t.seconds is None, t.seconds or 0.0))
    bucket = module.bucket(problem)
    return Search(
        op, name, where.name, bucket, topology.compiler(), len(candidates), tuple(ranked), tuple(skipped), heuristic
    )


class _Walk:
    """Chooses what to try next: those nearest to the best, in steps of all fields, and a quarter at random."""

    def __init__(self, candidates: Mapping[tuple, Blocks], start: Blocks) -> None:
        self._candidates = candidates
        self._start = start
        self._random = random.Random(0)
        names = list(start)
        self._values = {n: sorted({c[n] for c in candidates.values()}) for n in names}

    def next(self, trials: Mapping[tuple, Trial], count: int) -> list[Blocks]:
        left = {key: blocks for key, blocks in self._candidates.items() if key not in trials}
        if len(left) <= count:
            return list(left.values())
        timed = [t for t in trials.values() if t.seconds is not None]
        best = min(timed, key=lambda t: t.seconds or 0.0).blocks if timed else self._start
        order = sorted(left.items(), key=lambda item: (self._distance(item[1], best), self._random.random()))
        near = count - count // 4
        return [blocks for _, blocks in order[:near] + self._random.sample(order[near:], count - near)]

    def _distance(self, a: Blocks, b: Blocks) -> int:
        """Steps between two choices, in all fields together."""
        return sum(abs(v.index(a[n]) - v.index(b[n])) for n, v in self._values.items() if b[n] in v and a[n] in v)


def _trial(blocks: Blocks, vmem: int, outcome: Any) -> Trial:
    if outcome.report is None:
        return Trial(blocks, vmem, error=outcome.error)
    estimate = outcome.report.estimate
    if estimate.suspect:
        return Trial(blocks, vmem, error="; ".join(estimate.suspect))
    return Trial(blocks, vmem, estimate.seconds, estimate.ratio, estimate.bound, estimate.copies)


def _fields(blocks: Any) -> dict[str, Any]:
    return dataclasses.asdict(blocks)


def _key(blocks: Blocks) -> tuple:
    return tuple(blocks.values())


def shipped_table(op: str) -> Path:
    """The tuned table that ships with an op."""
    return Path(pallas_kernels.__path__[0]) / op / "tuned.json"


def write(path: str | Path, searches: Iterable[Search]) -> None:
    """Adds what searches found to a tuned table, which is replaced as a whole or not at all.

    Raises:
      InputError: the file is no such table, or cannot be written.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text()) if path.exists() else {}
        for found in searches:
            table.setdefault(found.chip, {})[found.bucket] = found.entry()
        text = json.dumps({c: dict(sorted(table[c].items())) for c in sorted(table)}, indent=1) + "\n"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except (OSError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot add to the tuned table {path}: {error}; name another file.") from error
