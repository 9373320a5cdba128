"""Weights as orbax keeps them, for those whose other tools do; the spec stands beside."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxinf.checkpoint.folders import written_beside
from jaxinf.checkpoint.own import config_of, describe
from jaxinf.checkpoint.parameters import pending
from jaxinf.checkpoint.quantization import told_by
from jaxinf.checkpoint.tensors import TensorInfo, Tensors
from jaxinf.models import CausalLM
from pallas_kernels.errors import CheckpointError

WEIGHTS = "weights"
"""The folder that orbax writes, inside the checkpoint's."""


def save_orbax(
    folder: str | Path,
    model: CausalLM,
    *,
    tokenizer_files: Iterable[str | Path] = (),
    generation: dict[str, Any] | None = None,
    overwrite: bool = False,
    scheme: str | None = None,
) -> Path:
    """As `save`, with the weights in `weights/` as orbax writes them: one entry a parameter, by name."""
    folder = Path(folder)
    values = {parameter.name: parameter.value() for parameter in pending(model)}
    with written_beside(folder, overwrite=overwrite) as scratch:
        config = config_of(model.spec, model.dtype, told_by(model, scheme), weights="orbax")
        describe(scratch, config, tokenizer_files, generation)
        write_orbax(scratch, values)
    return folder


def write_orbax(folder: Path, values: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / WEIGHTS, values)
    except OSError:
        raise
    except Exception as e:
        # What the system said is in the message alone, of whatever type the error is.
        if number := re.search(r"os_error_code='(\d+)'", str(e)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from e
        raise CheckpointError(f"orbax cannot write to {folder}: {_first_line(e)}; nothing was left behind") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off stderr what orbax's threads say of a failure that is raised here as well.

    Those that are still under way find their event loop closed, perhaps after this block.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def drop(record: logging.LogRecord) -> bool:
        return False

    def heard(unraisable) -> None:
        if not isinstance(unraisable.exc_value, RuntimeError) or "loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    logger.addFilter(drop)
    sys.unraisablehook = heard
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.removeFilter(drop)


class OrbaxTensors(Tensors):
    """Tensors that orbax wrote, read one by one."""

    def __init__(self, path: Path, infos: dict[str, TensorInfo]):
        super().__init__(infos)
        self._path = path

    def read(self, name: str) -> np.ndarray:
        import orbax.checkpoint as ocp

        return self._restore({name: ocp.RestoreArgs(restore_type=np.ndarray)})[name]

    def restore(self, wanted: Mapping[str, tuple[np.dtype, Sharding]]) -> dict[str, jax.Array]:
        """Several tensors, each in a dtype on the devices of a sharding; each process reads its own parts."""
        import orbax.checkpoint as ocp

        args = {n: ocp.ArrayRestoreArgs(sharding=where, dtype=dtype) for n, (dtype, where) in wanted.items()}
        return self._restore(args)

    def _restore(self, args: Mapping[str, Any]) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        item = {name: jax.ShapeDtypeStruct(self[name].shape, self[name].dtype) for name in args}
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                restore = ocp.args.PyTreeRestore(item=item, restore_args=dict(args), partial_restore=True)
                found = checkpointer.restore(self._path, args=restore)
                return {name: found[name] for name in args}
        except Exception as e:
            first, more = next(iter(args)), len(args) - 1
            some = f"{first} and {more} more" if more else first
            raise CheckpointError(f"orbax cannot read {some} of {self._path}: {_first_line(e)}") from e


def open_orbax(folder: Path) -> OrbaxTensors:
    """The tensors of a folder that `save_orbax` wrote.

    Raises:
      CheckpointError: orbax cannot read it.
    """
    import orbax.checkpoint as ocp

    path = folder.absolute() / WEIGHTS
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(path).item_metadata or {}
        infos = {
            name: TensorInfo(path, np.dtype(array.dtype), tuple(array.shape), 0) for name, array in found.items()
        }
    except Exception as e:
        raise CheckpointError(f"{path} holds no weights that orbax can read: {_first_line(e)}") from e
    if not infos:
        raise CheckpointError(f"{path} holds no weights that orbax can read; save the checkpoint again")
    return OrbaxTensors(path, infos)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
