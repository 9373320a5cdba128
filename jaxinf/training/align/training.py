"""The training of a draft against its frozen target: one jitted step, exact resuming."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.models import CausalLM, dequantize
from jaxinf.models.drafting.fingerprint import fingerprint
from jaxinf.training import pace
from jaxinf.training.align.losses import Loss, acceptance, compare, divergence
from jaxinf.training.data import Batches
from jaxinf.training.drafters.continuations import continuations
from jaxinf.training.loop import Network
from jaxinf.training.optimizer import OptimizerSpec, make_optimizer, rate_factor, scaled_update
from jaxinf.training.snapshots import Snapshots
from pallas_kernels.errors import InputError

Source = Literal["draft", "target"]


@dataclass(frozen=True)
class AlignSpec:
    """How to align a draft.

    loss: what is minimised, a mean over places.
    steps, batch, context: updates in all, rows of a batch, tokens of a row.
    on_policy: share of the batches whose rows are continued by a model from their first `prompt` tokens on, at
      temperature 1, spread evenly over the steps. source: which model continues them; the draft is the
      on-policy form of DistillSpec.
    """

    loss: Loss = "tvd"
    steps: int = 1000
    batch: int = 4
    context: int = 512
    on_policy: float = 0.0
    source: Source = "draft"
    prompt: int = 64
    optimizer: OptimizerSpec = field(default_factory=lambda: OptimizerSpec(0.01, 0.003))
    seed: int = 0

    def __post_init__(self):
        divergence(self.loss)
        for name in ("steps", "batch", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.on_policy <= 1:
            raise InputError(f"on_policy={self.on_policy} must be a share of the batches, from 0 to 1")
        if self.source not in ("draft", "target"):
            raise InputError(f"source={self.source!r} must be draft or target")
        if self.on_policy and not 1 <= self.prompt < self.context:
            raise InputError(f"prompt={self.prompt} must be at least 1 and below context={self.context}")

    def continues(self, step: int) -> bool:
        """Whether a model continues the rows of this step."""
        return int((step + 1) * self.on_policy) > int(step * self.on_policy)


@dataclass(frozen=True)
class AlignRecord:
    """What one step reports.

    loss, acceptance: means over the batch before the update; acceptance at temperature 1. text: "given", or
    the source of continuations. seconds: since the start.
    """

    step: int
    progress: float
    loss: float
    acceptance: float
    text: str
    seconds: float
    tokens: int


class Aligner:
    """Runs and resumes one alignment.

    Args:
      target: frozen; of any dtype, computed in its own.
      draft: where to start, of the same vocabulary. Quantised matrices are widened.
      spec: how.
      batches: where tokens come from; rows of `spec.context + 1`.
      folder: where checkpoints go; None: nowhere.

    Raises:
      InputError: the vocabularies differ, a context is longer than a model's, or the batches are of another shape.
    """

    def __init__(
        self, target: CausalLM, draft: CausalLM, spec: AlignSpec, batches: Batches, folder: Path | None = None
    ):
        check_pair(target, draft)
        longest = min(target.spec.context, draft.spec.context)
        if spec.context > longest:
            raise InputError(f"context={spec.context} must be at most {longest}, the models' own")
        if (batches.batch, batches.context) != (spec.batch, spec.context):
            raise InputError(
                f"batches of {batches.batch} x {batches.context} do not match {spec.batch} x {spec.context}"
            )
        self.spec, self.batches, self.folder = spec, batches, folder
        self.network = Network(draft.spec)
        self.params = self.network.params_of(draft)
        self.opt_state = make_optimizer(spec.optimizer, self.network.shapes).init(self.params)
        self.step, self.seconds, self.records = 0, 0.0, list[AlignRecord]()
        # Wide matrices are quicker to multiply with many rows, and mean the same.
        self.target = dequantize(target)
        self._target = nnx.split(self.target)
        self._snapshots = Snapshots(folder)

    @property
    def draft(self) -> CausalLM:
        """The draft as it is now, in float32."""
        return self.network.model(self.params)

    def progress(self, minutes: float | None = None) -> float:
        """Part of the run that is done: of the steps or, where further, of the time allowed."""
        return pace.part_done(self, self.spec.steps, minutes)

    def rows(self) -> tuple[np.ndarray, str]:
        """`(int32 [batch, context], whose text)` of this step."""
        spec, rows = self.spec, self.batches[self.step][:, :-1]
        if not spec.continues(self.step):
            return rows, "given"
        writer = self.draft if spec.source == "draft" else self.target
        made = continuations(
            writer,
            rows[:, : spec.prompt],
            tokens=spec.context - spec.prompt,
            temperatures=(1.0,),
            seed=(spec.seed * spec.steps + self.step) * spec.batch,
            batch=spec.batch,
        )
        return made, spec.source

    def run(
        self,
        *,
        minutes: float | None = None,
        until: int | None = None,
        checkpoint_minutes: float = 5.0,
        on_step: Callable[[AlignRecord], None] | None = None,
    ) -> None:
        """Train to the end, or to step `until`; `minutes` and Ctrl-C as for `jaxinf.training.loop.Trainer.run`."""

        def update(progress: float, start: float) -> None:
            self._update(progress, start)
            if on_step is not None:
                on_step(self.records[-1])

        pace.run(self, update, minutes=minutes, until=until, checkpoint_minutes=checkpoint_minutes)

    def _update(self, progress: float, start: float) -> None:
        rows, text = self.rows()
        factor = jnp.float32(rate_factor(self.spec.optimizer, progress))
        graph, state = self._target
        fixed = (self.network, graph, self.spec.optimizer, self.spec.loss)
        self.params, self.opt_state, (loss, accepted) = _update(
            *fixed, state, self.params, self.opt_state, rows, factor
        )
        loss, accepted = float(loss), float(accepted)
        self.step += 1
        self.seconds = time.monotonic() - start
        if not np.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {self.step}: lower the rate")
        record = AlignRecord(self.step, progress, loss, accepted, text, self.seconds, rows.size)
        self.records.append(record)

    def save(self) -> None:
        """Checkpoint the parameters, the optimiser's state, the step and the log."""
        log = {"seconds": self.seconds, "records": [asdict(r) for r in self.records], "recipe": self._recipe()}
        self._snapshots.save(self.step, self.params, self.opt_state, log)

    def resume(self) -> bool:
        """Go on from the latest checkpoint; False when there is none.

        Raises:
          CheckpointError: it was written with other settings or models.
        """
        recipe = self._recipe()
        found = self._snapshots.restore(self.params, self.opt_state, lambda log: log["recipe"] == recipe)
        if found is None:
            return False
        self.step, self.params, self.opt_state, log = found
        self.seconds = log["seconds"]
        self.records = [AlignRecord(**record) for record in log["records"]]
        return True

    def _recipe(self) -> dict:
        # As JSON gives it back: tuples become lists.
        recipe = {
            "align": asdict(self.spec),
            "target": fingerprint(self.target),
        }
        return json.loads(json.dumps(recipe))

    def close(self) -> None:
        """Release the checkpoint folder."""
        self._snapshots.close()


def check_pair(target: CausalLM, draft: CausalLM) -> None:
    """Raises InputError unless both are of one vocabulary."""
    if target.spec.vocab != draft.spec.vocab:
        raise InputError(
            f"the draft's vocabulary has {draft.spec.vocab} tokens and the target's {target.spec.vocab}: "
            "give a draft with the target's tokenizer"
        )


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6))
def _update(network: Network, graph, optimizer: OptimizerSpec, loss: Loss, state, params, opt_state, rows, factor):
    def mean(params):
        measures = (divergence(loss), acceptance)
        lost, accepted = compare(nnx.merge(graph, state), network.model(params), rows, measures)
        return jnp.mean(lost), jax.lax.stop_gradient(jnp.mean(accepted))

    (lost, accepted), gradients = jax.value_and_grad(mean, has_aux=True)(params)
    transform = make_optimizer(optimizer, network.shapes)
    params, opt_state = scaled_update(transform, gradients, opt_state, params, factor)
    return params, opt_state, (lost, accepted)
