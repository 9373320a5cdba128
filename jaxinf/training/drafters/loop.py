"""The training of heads: one jitted step, exact resuming, a schedule by steps and, if asked, by time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.models import CausalLM
from jaxinf.models.drafting import fingerprint
from jaxinf.training import pace
from jaxinf.training.drafters.rows import Rows
from jaxinf.training.drafters.tasks import Task
from jaxinf.training.optimizer import OptimizerSpec, make_optimizer, rate_factor, scaled_update
from jaxinf.training.snapshots import Snapshots
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class Phase:
    """Until `progress` of a run: text in rows of `length` tokens, drafts of `steps`."""

    progress: float
    length: int
    steps: int


@dataclass(frozen=True)
class HeadTraining:
    """How to train heads: updates in all, and the phases in order, the last with progress 1."""

    steps: int
    phases: tuple[Phase, ...]
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")
        if not self.phases or self.phases[-1].progress < 1:
            raise InputError("the last of phases must have progress=1")

    def phase(self, progress: float) -> Phase:
        return next((phase for phase in self.phases if progress < phase.progress), self.phases[-1])


@dataclass(frozen=True)
class HeadRecord:
    """What one step reports; `seconds` since the start.

    figures: by step of a draft, from 1: `kl_1` in nats, `top1_1` of [0, 1], `l1_1` of features.
    """

    step: int
    progress: float
    loss: float
    figures: dict[str, float]
    seconds: float
    tokens: int


class HeadTrainer:
    """Runs and resumes one training of heads for a frozen target.

    Args:
      task: what is trained. target: in float32 or narrower; it stays as it is.
      train: how. rows: where tokens come from.
      folder: where checkpoints go; None: nowhere.
    """

    def __init__(self, task: Task, target: CausalLM, train: HeadTraining, rows: Rows, folder: Path | None = None):
        self.task, self.target, self.train, self.rows = task, target, train, rows
        self.params = task.init(train.seed)
        self.opt_state = _optimizer(train.optimizer, self.params).init(self.params)
        self.step, self.seconds, self.records = 0, 0.0, list[HeadRecord]()
        self._made_for = {"target": fingerprint(target), "task": repr(task)}
        self._snapshots = Snapshots(folder)

    def progress(self, minutes: float | None = None) -> float:
        """Part of the run that is done: of the steps or, where further, of the time allowed."""
        return pace.part_done(self, self.train.steps, minutes)

    def run(
        self,
        *,
        minutes: float | None = None,
        until: int | None = None,
        checkpoint_minutes: float = 5.0,
        on_step: Callable[[HeadRecord], None] | None = None,
        on_save: Callable[[], None] | None = None,
    ) -> None:
        """Train to the end, or to step `until`; as `jaxinf.training.loop.Trainer.run`. on_save: called whenever
        `checkpoint_minutes` have passed."""

        def update(progress: float, start: float) -> None:
            phase = self.train.phase(progress)
            rows = self.rows.get(self.step, phase.length)
            factor = jnp.float32(rate_factor(self.train.optimizer, progress))
            self.params, self.opt_state, loss, figures = _update(
                self.task,
                self.train.optimizer,
                phase.steps,
                self.target,
                self.params,
                self.opt_state,
                rows,
                factor,
            )
            loss = float(loss)
            self.step += 1
            self.seconds = time.monotonic() - start
            if not np.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {self.step}: lower the learning rates")
            seen = {name: float(value) for name, value in figures.items()}
            tokens = rows.shape[0] * (rows.shape[1] - 1)
            record = HeadRecord(self.step, progress, loss, seen, self.seconds, tokens)
            self.records.append(record)
            if on_step is not None:
                on_step(record)

        pace.run(
            self,
            update,
            minutes=minutes,
            until=until,
            checkpoint_minutes=checkpoint_minutes,
            on_save=on_save,
        )

    def save(self) -> None:
        """Checkpoint the parameters, the optimiser's state, the step (so the place in the data) and the log."""
        log = {"seconds": self.seconds, "records": [asdict(r) for r in self.records], **self._made_for}
        self._snapshots.save(self.step, self.params, self.opt_state, log)

    def resume(self) -> bool:
        """Go on from the latest checkpoint; False when there is none.

        Raises:
          CheckpointError: it is of other heads, or of another target.
        """

        def fits(log: dict) -> bool:
            return all(log.get(key) == value for key, value in self._made_for.items())

        found = self._snapshots.restore(self.params, self.opt_state, fits)
        if found is None:
            return False
        self.step, self.params, self.opt_state, log = found
        self.seconds = log["seconds"]
        self.records = [HeadRecord(**record) for record in log["records"]]
        return True

    def close(self) -> None:
        """Release the checkpoint folder."""
        self._snapshots.close()


def _optimizer(spec: OptimizerSpec, params):
    return make_optimizer(spec, {path: x.shape for path, x in params.items()})


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def _update(task: Task, optimizer: OptimizerSpec, steps: int, target: CausalLM, params, opt_state, rows, factor):
    def loss(params):
        return task.loss(task.head(params), target, rows, steps)

    (value, report), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    transform = _optimizer(optimizer, params)
    params, opt_state = scaled_update(transform, gradients, opt_state, params, factor)
    return params, opt_state, value, report


def write_log(records: Sequence[HeadRecord], path: Path) -> None:
    """One JSON object a line."""
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(asdict(r)) + "\n" for r in records))
    beside.replace(path)
