"""From one form of checkpoint to another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxinf.checkpoint import own
from jaxinf.checkpoint.folders import GENERATION, check_target, read_json, tokenizer_files, written_beside
from jaxinf.checkpoint.loading import as_dtype, open_checkpoint
from jaxinf.checkpoint.orbax import write_orbax
from jaxinf.checkpoint.packing import stored
from jaxinf.checkpoint.parameters import Planned, everything
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
    opened = open_checkpoint(source)
    dtype = dtype or opened.dtype
    parameters = to_write(opened.plan(dtype, "list")[1])
    generation = read_json(source / GENERATION) if (source / GENERATION).is_file() else None
    with written_beside(target, overwrite=overwrite) as scratch:
        more = {"weights": "orbax"} if to == "orbax" else {}
        config = own.config_of(opened.spec, dtype, opened.quantization, **more)
        own.describe(scratch, config, tokenizer_files(source), generation)
        if to == "safetensors":
            write(scratch, parameters, shard_bytes=shard_bytes, progress=progress)
        else:
            write_orbax(scratch, {p.name: p.value() for p in parameters})
            if progress is not None:
                total = sum(p.nbytes for p in parameters)
                progress(total, total)
    return target


def to_write(plan: Sequence[Planned]) -> list[Pending]:
    """The arrays of a planned model of the layout "list", as files have them."""
    out = []
    for leaf, read in plan:
        shape = tuple(leaf.value.shape)
        whole = functools.partial(read, everything(shape))
        out.append(stored(Pending(leaf.names[0], np.dtype(leaf.value.dtype), shape, whole)))
    return out
