"""Checkpoints of a training: parameters, the optimiser's state, and a log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pallas_kernels.errors import CheckpointError

Params = dict[str, jax.Array]


class Snapshots:
    """The latest two checkpoints of a run, in `folder/checkpoints`; without a folder none are kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._manager = None
        if folder is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)

    def save(self, step: int, params: Params, opt_state: Any, log: dict[str, Any]) -> None:
        """Keep the state after `step`, unless it is kept already. log: what JSON can hold."""
        if self._manager is None or step in self._manager.all_steps():
            return
        log = {**log, "shapes": shapes(params)}
        arrays = {"params": params, "optimizer": _leaves(opt_state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), log=ocp.args.JsonSave(log))
        )
        self._manager.wait_until_finished()

    def restore(
        self, params: Params, opt_state: Any, fits: Callable[[dict[str, Any]], bool]
    ) -> tuple[int, Params, Any, dict[str, Any]] | None:
        """`(step, params, opt_state, log)` of the latest checkpoint, or None where there is none.

        Args:
          params, opt_state: arrays of the shapes that are expected.
          fits: whether a log is that of the run to go on with.

        Raises:
          CheckpointError: it is not, or the parameters are of other shapes.
        """
        latest = None if self._manager is None else self._manager.latest_step()
        if self._manager is None or latest is None:
            return None
        log = self._manager.restore(latest, args=ocp.args.Composite(log=ocp.args.JsonRestore()))["log"]
        if log["shapes"] != shapes(params) or not fits(log):
            raise CheckpointError(
                f"the checkpoint of step {latest} in {self.folder} does not fit this recipe: "
                "resume with the recipe that wrote it, or choose another folder"
            )
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"params": params, "optimizer": _leaves(opt_state)},
        )
        saved = self._manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))[
            "state"
        ]
        leaves = saved["optimizer"]
        opt_state = jax.tree.unflatten(jax.tree.structure(opt_state), [leaves[k] for k in sorted(leaves)])
        return latest, saved["params"], opt_state, log

    def close(self) -> None:
        """Release the folder."""
        if self._manager is not None:
            self._manager.close()


def shapes(params: Params) -> dict[str, list[int]]:
    """The shape of each parameter, as JSON has it."""
    return {path: list(x.shape) for path, x in params.items()}


def _leaves(tree: Any) -> Params:
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
