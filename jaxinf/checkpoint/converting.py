"""From one form of checkpoint to another."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy as np

from jaxinf.checkpoint import own
from jaxinf.checkpoint.folders import GENERATION, check_target, read_json, tokenizer_files, written_beside
from jaxinf.checkpoint.loading import as_dtype, open_checkpoint, read_config, stored_dtype
from jaxinf.checkpoint.orbax import write_orbax
from jaxinf.checkpoint.parameters import abstract, everything, planned
from jaxinf.checkpoint.tensors import SHARD_BYTES, Pending, write
from pallas_kernels.errors import InputError


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["safetensors", "orbax"] = "safetensors",
    dtype=None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: own.Progress | None = None,
) -> Path:
    """Writes the checkpoint in `source`, of any form that `load` reads, as `target` in this project's form.

    One tensor at a time is in memory when writing safetensors. The tokenizer's files and
    `generation_config.json` come along. `target` is complete or untouched.

    Args:
      to: how the weights are kept.
      dtype: "float32", "bfloat16" or "float16"; None: as they are.
      overwrite: replace a checkpoint that is there.
      shard_bytes: largest safetensors file of several tensors.
      progress: called with (bytes written, bytes in all).

    Raises:
      CheckpointError, UnsupportedError: as `load`; or `target` exists, or cannot be written.
      InputError: an unknown form or dtype, or `target` holds `source`.
    """
    source, target = Path(source), Path(target)
    if to not in ("safetensors", "orbax"):
        raise InputError(f'to={to!r} must be "safetensors" or "orbax"')
    if target.resolve() in source.resolve().parents:
        raise InputError(f"target {target} holds source {source}; give a folder beside it")
    dtype = None if dtype is None else as_dtype(dtype, f"dtype={dtype!r}")
    check_target(target, overwrite=overwrite)
    config = read_config(source)
    tensors, spec, names = open_checkpoint(source, config)
    dtype = dtype or stored_dtype(config, tensors)
    plan = planned(abstract(spec, dtype, "list"), tensors, names.source, ignorable=names.ignorable, at=str(source))
    parameters = []
    for leaf, read in plan:
        shape = tuple(leaf.value.shape)
        whole = functools.partial(read, everything(shape))
        parameters.append(Pending(leaf.names[0], np.dtype(leaf.value.dtype), shape, whole))
    generation = read_json(source / GENERATION) if (source / GENERATION).is_file() else None
    with written_beside(target, overwrite=overwrite) as scratch:
        if to == "safetensors":
            own.describe(scratch, own.config_of(spec, dtype), tokenizer_files(source), generation)
            write(scratch, parameters, shard_bytes=shard_bytes, progress=progress)
        else:
            own.describe(scratch, own.config_of(spec, dtype, weights="orbax"), tokenizer_files(source), generation)
            write_orbax(scratch, {p.name: p.value() for p in parameters})
            if progress is not None:
                total = sum(p.nbytes for p in parameters)
                progress(total, total)
    return target
