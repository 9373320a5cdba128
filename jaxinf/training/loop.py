"""The training loop: one jitted step, exact resuming, a schedule by steps and, if asked, by time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxinf.models import CausalLM, ModelSpec
from jaxinf.quant import QTensor
from jaxinf.training import pace
from jaxinf.training.data import Batches
from jaxinf.training.optimizer import OptimizerSpec, make_optimizer, rate_factor, scaled_update
from jaxinf.training.rounding import Rounding, start_qat
from jaxinf.training.snapshots import Params, Snapshots
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class TrainSpec:
    """How to train one model.

    batch, context: rows of a batch and tokens of a row; `context` is also the longest that is learned.
    steps: updates in all.
    phases: `(progress, length)`, in order: until `progress` of the run rows are cut into pieces of `length`
      tokens, which makes attention cheaper; the last phase must be `(1.0, context)`.
    balance: weight of the mixtures' load-balancing loss.
    rounding: how matrices will be stored; the loss is that of the model so stored. None: as they are.
    """

    batch: int
    context: int
    steps: int
    phases: tuple[tuple[float, int], ...] = ()
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    balance: float = 0.01
    seed: int = 0
    rounding: Rounding | None = None

    def __post_init__(self):
        for name in ("batch", "context", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if any(self.context % length for _, length in self.phases):
            raise InputError(f"phases={self.phases} must have lengths that divide context={self.context}")

    def length(self, progress: float) -> int:
        """Tokens of a row at `progress` in [0, 1] of the run."""
        return next((length for until, length in self.phases if progress < until), self.context)


@dataclass(frozen=True)
class StepRecord:
    """What one step reports; `loss` is nats per token without the balancing loss, `seconds` since the start."""

    step: int
    progress: float
    loss: float
    balance: float
    seconds: float
    tokens: int


class Network:
    """A `CausalLM` as a pure function of a flat dict of parameters, path to array.

    With a rounding the module computes as it will once they are rounded; the parameters are the same.
    """

    def __init__(self, spec: ModelSpec, rounding: Rounding | None = None):
        self.spec, self.rounding = spec, rounding
        abstract = nnx.eval_shape(lambda: CausalLM(spec, rngs=nnx.Rngs(0), param_dtype=jnp.float32))
        if rounding is not None:
            abstract = start_qat(abstract, rounding)
        self.graph, state = nnx.split(abstract)
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(state)
        self.paths = tuple(_name(path) for path, _ in leaves)
        self.shapes = {path: leaf.shape for path, (_, leaf) in zip(self.paths, leaves, strict=True)}

    def __eq__(self, other) -> bool:
        # Equal networks share what jit compiled.
        return isinstance(other, Network) and (self.spec, self.rounding) == (other.spec, other.rounding)

    def __hash__(self) -> int:
        return hash((self.spec, self.rounding))

    def init(self, seed: int) -> Params:
        """Fresh float32 parameters; those that write to the residual stream shrink by sqrt(2 * depth)
        (GPT-2: Radford et al. 2019)."""
        model = CausalLM(self.spec, rngs=nnx.Rngs(seed), param_dtype=jnp.float32)
        leaves = jax.tree.leaves(nnx.split(model)[1])
        params = dict(zip(self.paths, leaves, strict=True))
        shrink = (2 * self.spec.depth) ** -0.5
        return {
            path: x * shrink if x.ndim >= 2 and {"out", "down"} & set(path.split("/")) else x
            for path, x in params.items()
        }

    def params_of(self, model: CausalLM) -> Params:
        """Float32 copies of the parameters of a model of this spec; of quantised matrices, what they stand for.

        Raises:
          InputError: it is of another spec.
        """
        if model.spec != self.spec or model.layout != "list":
            raise InputError("the model to start from is not of the spec that is trained: give one of the recipe's")
        leaves = jax.tree.leaves(nnx.split(model)[1], is_leaf=lambda x: isinstance(x, QTensor))
        wide = [x.dequantize() if isinstance(x, QTensor) else jnp.array(x, jnp.float32) for x in leaves]
        return dict(zip(self.paths, wide, strict=True))

    def model(self, params: Params) -> CausalLM:
        """The module with these parameters (inside `jit` too)."""
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, [params[path] for path in self.paths]))

    def loss(
        self, params: Params, rows: jax.Array, balance: float
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """int32 `[B, T + 1]` -> `(what is minimised, (nats per token, balancing loss))`."""
        logits, uneven = self.model(params).train_logits(rows[:, :-1])
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]))
        return loss + balance * uneven, (loss, uneven)


def _name(path: Sequence) -> str:
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
    return "/".join(str(key) for key in keys if key is not None)


def pieces(rows: np.ndarray, length: int) -> np.ndarray:
    """Cut rows `[B, T + 1]` into `[B * T / length, length + 1]`; neighbours share one token."""
    count = (rows.shape[1] - 1) // length
    return np.concatenate([rows[:, i * length : (i + 1) * length + 1] for i in range(count)])


class Trainer:
    """Runs and resumes one training.

    Args:
      spec: what to train.
      train: how.
      batches: where tokens come from; rows of `train.context + 1`.
      folder: where checkpoints and the log go; None: nowhere.
      start: a model to go on from; None: fresh parameters.
    """

    def __init__(
        self,
        spec: ModelSpec,
        train: TrainSpec,
        batches: Batches,
        folder: Path | None = None,
        start: CausalLM | None = None,
    ):
        if batches.context != train.context or batches.batch != train.batch:
            raise InputError(
                f"batches of {batches.batch} x {batches.context} do not match the recipe's "
                f"{train.batch} x {train.context}: make them alike"
            )
        self.network, self.train = Network(spec, train.rounding), train
        self.batches, self.folder = batches, folder
        self.params = self.network.init(train.seed) if start is None else self.network.params_of(start)
        self.opt_state = make_optimizer(train.optimizer, self.network.shapes).init(self.params)
        self.step, self.seconds, self.records = 0, 0.0, list[StepRecord]()
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
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """Train to the end, or to step `until`.

        With `minutes` the schedule follows the clock where that is ahead of the steps: the rate still falls to
        0, but the run is then not reproducible bit by bit. Ctrl-C saves a checkpoint and raises again.
        """

        def update(progress: float, start: float) -> None:
            rows = pieces(self.batches[self.step], self.train.length(progress))
            factor = jnp.float32(rate_factor(self.train.optimizer, progress))
            self.params, self.opt_state, (loss, balance) = _update(
                self.network,
                self.train.optimizer,
                self.train.balance,
                self.params,
                self.opt_state,
                rows,
                factor,
            )
            loss, balance = float(loss), float(balance)
            self.step += 1
            self.seconds = time.monotonic() - start
            if not np.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {self.step}: lower the learning rates")
            tokens = self.train.batch * self.train.context
            record = StepRecord(self.step, progress, loss, balance, self.seconds, tokens)
            self.records.append(record)
            if on_step is not None:
                on_step(record)

        pace.run(self, update, minutes=minutes, until=until, checkpoint_minutes=checkpoint_minutes)

    def save(self) -> None:
        """Checkpoint the parameters, the optimiser's state, the step (so the place in the data) and the log."""
        log = {
            "seconds": self.seconds,
            "records": [asdict(r) for r in self.records],
            "rounding": self._rounding(),
        }
        self._snapshots.save(self.step, self.params, self.opt_state, log)

    def resume(self) -> bool:
        """Go on from the latest checkpoint; False when there is none."""
        rounding = self._rounding()
        found = self._snapshots.restore(self.params, self.opt_state, lambda log: log.get("rounding") == rounding)
        if found is None:
            return False
        self.step, self.params, self.opt_state, log = found
        self.seconds = log["seconds"]
        self.records = [StepRecord(**record) for record in log["records"]]
        return True

    def _rounding(self) -> dict[str, Any] | None:
        return None if self.train.rounding is None else asdict(self.train.rounding)

    def close(self) -> None:
        """Release the checkpoint folder."""
        self._snapshots.close()


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _update(network: Network, optimizer: OptimizerSpec, balance: float, params, opt_state, rows, factor):
    gradients, report = jax.grad(network.loss, has_aux=True)(params, rows, balance)
    transform = make_optimizer(optimizer, network.shapes)
    params, opt_state = scaled_update(transform, gradients, opt_state, params, factor)
    return params, opt_state, report


def write_log(records: Sequence[Any], path: Path) -> None:
    """One JSON object a line: of each record (a dataclass)."""
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(asdict(r)) + "\n" for r in records))
    beside.replace(path)


def plot_loss(records: Sequence[StepRecord], path: Path) -> bool:
    """A PNG of the loss over tokens; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    losses = np.array([r.loss for r in records])
    tokens = np.cumsum([r.tokens for r in records])
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens / 1e6, losses, alpha=0.3, linewidth=0.8)
    axes.plot(tokens[width - 1 :] / 1e6, smooth)
    axes.set(xlabel="million tokens", ylabel="nats per token")
    figure.savefig(path, dpi=120)
    return True
