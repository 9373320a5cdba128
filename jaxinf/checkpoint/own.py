"""The project's own form of a checkpoint: the spec in `config.json`, parameters under their own names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxinf.checkpoint.folders import CONFIG, GENERATION, write_json, written_beside
from jaxinf.checkpoint.parameters import Source, pending
from jaxinf.checkpoint.quantization import KEY, Quantization, told_by
from jaxinf.checkpoint.tensors import SHARD_BYTES, write
from jaxinf.core import from_record, to_record
from jaxinf.models import CausalLM, ModelSpec
from pallas_kernels.errors import CheckpointError, InputError

MODEL_TYPE, VERSION = "jaxinf", 1
Progress = Callable[[int, int], None]


def save(
    folder: str | Path,
    model: CausalLM,
    *,
    tokenizer_files: Iterable[str | Path] = (),
    generation: dict[str, Any] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    scheme: str | None = None,
) -> Path:
    """Writes a folder that `load` reads back bit for bit, in either layout.

    It holds `config.json`, `model.safetensors` (or shards with an index), the tokenizer's files and
    `generation_config.json`. It is written beside and renamed: `folder` is complete or untouched.

    Args:
      tokenizer_files: copied under their own names.
      generation: end-of-sequence tokens and default sampling, with the keys of Hugging Face.
      overwrite: replace a checkpoint that is there.
      shard_bytes: largest file of several tensors.
      progress: called with (bytes written, bytes in all).
      scheme: what `config.json` says of how a quantised model came about; None: its format.

    Returns:
      The folder's path.

    Raises:
      CheckpointError: the folder exists, or cannot be written.
      UnsupportedError: parts of the model are with other processes.
    """
    folder = Path(folder)
    with written_beside(folder, overwrite=overwrite) as scratch:
        config = config_of(model.spec, model.dtype, told_by(model, scheme))
        describe(scratch, config, tokenizer_files, generation)
        write(scratch, pending(model), shard_bytes=shard_bytes, progress=progress)
    return folder


def describe(
    folder: Path, config: dict[str, Any], tokenizer_files: Iterable[str | Path], generation: dict[str, Any] | None
) -> None:
    """Writes everything but the weights."""
    write_json(folder / CONFIG, config)
    if generation:
        write_json(folder / GENERATION, generation)
    for file in map(Path, tokenizer_files):
        if not file.is_file():
            raise CheckpointError(f"tokenizer file {file} is not there")
        shutil.copyfile(file, folder / file.name)


def config_of(spec: ModelSpec, dtype, quantization: Quantization | None = None, **more: str) -> dict[str, Any]:
    """The `config.json` of a model."""
    return {
        "model_type": MODEL_TYPE,
        "version": VERSION,
        "dtype": str(jnp.dtype(dtype)),
        **more,
        **({} if quantization is None else {KEY: quantization.record()}),
        "spec": to_record(spec),
    }


class OwnNames:
    """Every parameter lies under its own name, and nothing else does."""

    def source(self, name: str) -> Source:
        return Source((name,))

    def ignorable(self, name: str) -> bool:
        return False


def spec_of(config: dict[str, Any], at: Path) -> ModelSpec:
    """The spec in a `config.json` of this form.

    Raises:
      CheckpointError: a later version wrote it, or the record does not describe a model.
    """
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{at} is version {json.dumps(config.get('version'))} of this format; this build reads {VERSION}"
        )
    if unknown := sorted(set(config) - {"model_type", "version", "dtype", "spec", "weights", KEY}):
        raise CheckpointError(f"{at} has keys that are not understood: {', '.join(unknown)}")
    try:
        return from_record(ModelSpec, config.get("spec"))
    except InputError as e:
        raise CheckpointError(f"{at} does not describe a model: {e}") from e
