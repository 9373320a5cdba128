"""From a pair of models to an aligned draft: train, export, and measure both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf import checkpoint
from jaxinf.checkpoint.loading import Loaded
from jaxinf.models import CausalLM
from jaxinf.training.align.measure import make_contexts, measure, report
from jaxinf.training.align.text import spread
from jaxinf.training.align.training import Aligner, AlignRecord, AlignSpec, check_pair
from jaxinf.training.data import Batches, Documents
from jaxinf.training.loop import write_log
from pallas_kernels.errors import CheckpointError, InputError

EXPORT, REPORT, LOG = "export", "report.json", "log.jsonl"


@dataclass(frozen=True)
class Probe:
    """What the pair is compared on before and after: `rows` pieces of held-out text of `length` tokens, and the
    target's continuations of their first `prompt` tokens."""

    rows: int = 128
    length: int = 192
    prompt: int = 128


def align(
    target: CausalLM,
    draft: Loaded,
    documents: Documents,
    held_out: np.ndarray,
    spec: AlignSpec,
    out: Path,
    *,
    tokenizer_files: Sequence[Path] = (),
    minutes: float | None = None,
    resume: bool = False,
    probe: Probe | None = None,
    on_step: Callable[[AlignRecord], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a draft to match its frozen target, and say by how much it does.

    `out` gets `checkpoints/`, `log.jsonl` (a line a step), `report.json`, and `export/`: the draft with wide
    matrices, in the dtype it was read in.

    Args:
      target, draft: of one vocabulary, without a mesh; the draft is exported in its own dtype.
      documents: what is trained on. held_out: tokens `[N]` to measure on.
      tokenizer_files: copied into the export.
      minutes: end after this long at most; not reproducible bit by bit.
      resume: go on from the latest checkpoint in `out`, which another run of the same settings wrote.
      probe: what is measured; None: the default sizes, less where the models' contexts are shorter.
      on_step: called after each step. note: told what goes on. progress: of making the contexts of the report.

    Returns:
      The report: `{"loss", "steps", "seconds", "contexts": [...]}`; see `jaxinf.training.align.measure.report`.

    Raises:
      InputError: different vocabularies, or too little text.
      CheckpointError: `out` holds checkpoints and `resume` is false, or they are of another run.
    """
    check_pair(target, draft.model)
    if not resume and any((out / "checkpoints").glob("*")):
        raise CheckpointError(f"{out} holds the checkpoints of an earlier run: pass --resume, or another --out")
    batches = Batches(documents, batch=spec.batch, context=spec.context, seed=spec.seed)
    probe = probe or _probe(min(target.spec.context, draft.model.spec.context))
    spread(held_out, probe.rows, probe.length)  # complains now rather than in the end
    aligner = Aligner(target, draft.model, spec, batches, out)
    try:
        if resume and aligner.resume():
            note(f"resumed at step {aligner.step}")
        aligner.run(minutes=minutes, on_step=on_step)
        write_log(aligner.records, out / LOG)
        exported = checkpoint.save(
            out / EXPORT,
            _in(aligner.draft, draft.model.dtype),
            tokenizer_files=tokenizer_files,
            generation=draft.generation or None,
            overwrite=True,
        )
    finally:
        aligner.close()
    note("the target continues held-out text, to measure on")
    made = dict(rows=probe.rows, length=probe.length, prompt=probe.prompt, seed=spec.seed)
    contexts = make_contexts(aligner.target, held_out, **made, progress=progress)
    start = aligner.network.model(aligner.network.params_of(draft.model))
    aligned = checkpoint.load(exported, dtype="float32", layout="list").model
    before, after = (measure(aligner.target, model, contexts) for model in (start, aligned))
    found = {
        "loss": spec.loss,
        "steps": aligner.step,
        "tokens": sum(r.tokens for r in aligner.records),
        "seconds": aligner.seconds,
        "contexts": report(contexts, before, after),
    }
    _write_json(out / REPORT, found)
    return found


def _probe(context: int) -> Probe:
    length = min(Probe.length, context)
    if length < 2:
        raise InputError(f"the models' context of {context} tokens is too short to predict anything")
    return Probe(length=length, prompt=min(Probe.prompt, (2 * length + 2) // 3))


def _in(model: CausalLM, dtype) -> CausalLM:
    graph, state = nnx.split(model)
    flat = [(path, v.replace(v.get_value().astype(jnp.dtype(dtype)))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)
