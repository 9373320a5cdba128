"""From a target and text to heads in a folder: continue, train, round, measure, store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxinf.checkpoint.drafters import Drafting, rank_table, save_drafter
from jaxinf.layers import FFNSpec, LayerSpec
from jaxinf.models import CausalLM, ModelSpec
from jaxinf.models.drafting import AheadSpec, EagleSpec, MedusaSpec, fingerprint, narrowed
from jaxinf.training.align.text import spread
from jaxinf.training.data import Batches, Documents
from jaxinf.training.drafters.ahead import PassTask
from jaxinf.training.drafters.continuations import continuations, cut_prompts
from jaxinf.training.drafters.loop import HeadRecord, HeadTrainer, HeadTraining, Phase, write_log
from jaxinf.training.drafters.measure import agreement, loops, ranks, tokens_per_pass
from jaxinf.training.drafters.rows import Rows
from jaxinf.training.drafters.tasks import EagleTask, MedusaTask, Task
from jaxinf.training.optimizer import OptimizerSpec
from pallas_kernels.errors import CheckpointError, InputError

HeadKind = Literal["medusa", "eagle", "mtp", "pass"]
EXPORT, REPORT, LOG, OWN = "export", "report.json", "log.jsonl", "continuations.npy"


@dataclass(frozen=True)
class HeadRecipe:
    """How heads are made.

    heads: of Medusa; look-ahead tokens of PaSS. modules: of multi-token prediction. blocks: of a head or a module.
    width: hidden channels of a block; None: three times the features', and none of Medusa's (one matrix a block).
    steps, batch, context: updates in all, rows of text in each, tokens of a row.
    unroll: steps of a draft that eagle and mtp learn, once they have learned the first for a third of the run.
    continuations: rows that the target writes itself, `own` tokens behind `prompt` of the text, for half of the
      updates; 0: none.
    format: how matrices are stored, a name in `jaxinf.quant.FORMATS`; None: bfloat16.
    probe: held-out prompts that the heads are measured on, by the `fresh` tokens that the target, greedy, writes
      behind each.
    """

    kind: HeadKind
    heads: int = 4
    modules: int = 2
    blocks: int = 1
    width: int | None = None
    steps: int = 2000
    batch: int = 4
    context: int = 1024
    unroll: int = 3
    continuations: int = 3072
    prompt: int = 97
    own: int = 160
    format: str | None = "int8"
    probe: int = 160
    fresh: int = 48
    seed: int = 0
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)

    def fitted(self, target: ModelSpec) -> HeadRecipe:
        """With rows that the target's context holds."""
        context = min(self.context, target.context)
        prompt = min(self.prompt, max(1, context // 4))
        left = context - prompt
        return replace(self, context=context, prompt=prompt, own=min(self.own, left), fresh=min(self.fresh, left))

    def task(self, target: ModelSpec) -> Task:
        """What is trained for a target.

        Raises:
          InputError: there is no such kind, or a size is below 1.
        """
        if self.kind == "medusa":
            return MedusaTask(MedusaSpec(target.d_model, self.heads, self.blocks, self.width))
        if self.kind == "pass":
            return PassTask(AheadSpec(target.d_model, self.heads))
        if self.kind not in ("eagle", "mtp"):
            raise InputError(f"kind={self.kind!r} must be medusa, eagle, mtp or pass")
        modules = 1 if self.kind == "eagle" else self.modules
        last = list(target.layers())[-1]
        layer = LayerSpec(
            replace(last.attention, window=None), FFNSpec(self.width or 3 * target.d_model), norm=last.norm
        )
        return EagleTask(EagleSpec(target.d_model, layer, self.blocks, modules, last.norm))

    def training(self, task: Task) -> HeadTraining:
        """The run: short rows first, which make attention cheap."""
        short, middle = _part(self.context, 4), _part(self.context, 2)
        if self.kind == "pass":
            # A row has one draft, at its end: short rows are many.
            phases = (Phase(0.8, _part(self.context, 16), task.depth), Phase(1.0, short, task.depth))
        elif self.kind == "medusa":
            phases = (Phase(0.8, short, task.depth), Phase(1.0, middle, task.depth))
        else:
            first = self.modules if self.kind == "mtp" else 1
            more = max(self.unroll, first)
            phases = (Phase(0.35, short, first), Phase(0.85, short, more), Phase(1.0, middle, more))
        return HeadTraining(self.steps, phases, self.optimizer, self.seed)


def _part(context: int, parts: int) -> int:
    return context // parts if context % parts == 0 and context // parts >= 16 else context


def train_heads(
    target: CausalLM,
    documents: Documents,
    held_out: np.ndarray,
    recipe: HeadRecipe,
    out: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    on_step: Callable[[HeadRecord], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train heads for a frozen target, and say how much of what the target writes they foresee.

    `out` gets `checkpoints/`, `continuations.npy`, `log.jsonl` (a line a step), `report.json`, and `export/`, the
    folder of the heads.

    Args:
      target: without a mesh, in the dtype that it is to be computed in.
      documents: what is trained on. held_out: tokens `[N]` to measure on.
      minutes: end after this long at most, apart from continuations; not reproducible bit by bit.
      resume: go on from the latest checkpoint in `out`.
      on_step: called after each step. note: told what goes on. progress: of the continuations.

    Returns:
      The report of `assess`, and `{"kind", "parameters", "bytes", "steps", "tokens", "seconds"}`.

    Raises:
      InputError: too little text, or a recipe that does not fit.
      CheckpointError: `out` holds checkpoints and `resume` is false, or they are of another run.
    """
    if not resume and any((out / "checkpoints").glob("*")):
        raise CheckpointError(f"{out} holds the checkpoints of an earlier run: pass --resume, or another --out")
    recipe = recipe.fitted(target.spec)
    task = recipe.task(target.spec)
    out.mkdir(parents=True, exist_ok=True)
    batches = Batches(documents, batch=recipe.batch, context=recipe.context, seed=recipe.seed)
    own = _own_rows(target, documents, recipe, out, note, progress) if recipe.continuations else None
    note("the target continues held-out text, to measure on")
    probe = probes(target, held_out, recipe)
    trainer = HeadTrainer(task, target, recipe.training(task), Rows(batches, own), out)
    try:
        if resume and trainer.resume():
            note(f"resumed at step {trainer.step}")

        def check() -> None:
            note(f"step {trainer.step}: {told(assess(task, task.head(trainer.params), target, *probe))}")

        trainer.run(minutes=minutes, on_step=on_step, on_save=check)
        write_log(trainer.records, out / LOG)
        head = narrowed(task.head(trainer.params), recipe.format)
        found = assess(task, head, target, *probe)
        made = Drafting(head, fingerprint(target), rank_table(found.pop("found")))
        save_drafter(out / EXPORT, made, overwrite=True)
        found |= {
            "kind": made.kind,
            "parameters": sum(x.size for x in trainer.params.values()),
            "bytes": sum(f.stat().st_size for f in (out / EXPORT).iterdir()),
            "steps": trainer.step,
            "tokens": sum(r.tokens for r in trainer.records),
            "seconds": trainer.seconds,
        }
    finally:
        trainer.close()
    beside = out / f"{REPORT}.part"
    beside.write_text(json.dumps(found, indent=2) + "\n")
    beside.replace(out / REPORT)
    return found


def probes(target: CausalLM, held_out: np.ndarray, recipe: HeadRecipe) -> tuple[np.ndarray, int, int]:
    """`(rows, where continuations begin in them, how many rows were left out because they loop)`: held-out prompts
    and what the target, greedy, writes behind them.

    Raises:
      InputError: all of them loop, or the text is too short.
    """
    prompts = spread(held_out, recipe.probe, recipe.prompt)
    rows = continuations(target, prompts, tokens=recipe.fresh, temperatures=(0.0,), batch=min(64, len(prompts)))
    lively = np.array([not loops(row[recipe.prompt :]) for row in rows])
    if not lively.any():
        lively[:] = True  # an untrained target says one thing again and again: measure that
    return rows[lively], recipe.prompt, int(np.sum(~lively))


def assess(task: Task, head: Any, target: CausalLM, rows: np.ndarray, first: int, left_out: int) -> dict[str, Any]:
    """How much of greedy continuations a head foresees.

    Args:
      rows, first, left_out: of `probes`.

    Returns:
      `{"rows", "left_out", "agreement": {k: by step}, "tokens_per_pass": {depth: with chains}, "found": ranks}`.
    """
    found = ranks(task, head, target, rows)
    own = found[:, first - 1 :]
    return {
        "rows": len(rows),
        "left_out": left_out,
        "agreement": {str(k): values for k, values in agreement(own).items()},
        "tokens_per_pass": {str(d): tokens_per_pass(found, first, d) for d in range(1, task.depth + 1)},
        "found": own,
    }


def told(found: dict[str, Any]) -> str:
    """A report for people, on one line."""
    first = ", ".join(f"{x:.3f}" for x in found["agreement"]["1"])
    passes = ", ".join(f"{x:.2f}" for x in found["tokens_per_pass"].values())
    return f"agreement by place {first}; tokens a pass with chains of 1, 2, ...: {passes}"


def _own_rows(target, documents, recipe: HeadRecipe, out: Path, note, progress) -> np.ndarray:
    """What the target writes behind pieces of the text; kept in `out`, with what it was made from."""
    file, made = out / OWN, out / f"{OWN}.json"
    key = {n: getattr(recipe, n) for n in ("continuations", "prompt", "own", "seed")}
    key |= {"target": fingerprint(target), "tokens": len(documents.tokens)}
    if file.is_file() and made.is_file() and json.loads(made.read_text()) == key:
        return np.load(file, allow_pickle=False)
    note(f"the target continues {recipe.continuations} pieces of the text")
    prompts = cut_prompts(documents, count=recipe.continuations, length=recipe.prompt, seed=recipe.seed)
    rows = continuations(target, prompts, tokens=recipe.own, seed=recipe.seed, progress=progress)
    beside = out / f".{OWN}.part.npy"
    np.save(beside, rows, allow_pickle=False)
    beside.replace(file)
    made.write_text(json.dumps(key))
    return rows
