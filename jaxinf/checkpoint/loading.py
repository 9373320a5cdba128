"""From a folder to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.checkpoint import own
from jaxinf.checkpoint.folders import CONFIG, GENERATION, read_json
from jaxinf.checkpoint.parameters import Source, abstract, fill
from jaxinf.checkpoint.tensors import Tensors, open_tensors
from jaxinf.models import CausalLM
from jaxinf.models.causal_lm import Layout
from pallas_kernels.errors import CheckpointError, InputError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    config, generation: `config.json` and `generation_config.json` as they stand ({} if absent).
    folder: where it was read; the tokenizer's files lie there.
    """

    model: CausalLM
    config: dict[str, Any]
    generation: dict[str, Any]
    folder: Path


def load(folder: str | Path, *, dtype=None, layout: Layout | None = None) -> Loaded:
    """Reads a checkpoint, tensor by tensor, straight into the dtype and layout asked for.

    Args:
      folder: of this project's form (`save`, `save_orbax`) or of Hugging Face's.
      dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's.
      layout: "list" or "stacked"; None: "list" on a CPU, "stacked" elsewhere.

    Raises:
      CheckpointError: what is there is not a whole checkpoint, or does not match its config.
      UnsupportedError: the config asks for maths that this build does not have.
      InputError: an unknown dtype or layout.
    """
    folder = Path(folder)
    if dtype is not None:
        dtype = _dtype(dtype, f"dtype={dtype!r}")
    layout = layout or ("list" if jax.default_backend() == "cpu" else "stacked")
    if layout not in ("list", "stacked"):
        raise InputError(f'layout={layout!r} must be "list" or "stacked"')
    config = read_config(folder)
    path = folder / GENERATION
    generation = read_json(path) if path.is_file() else {}
    spec = own.spec_of(config, folder / CONFIG)
    tensors = open_tensors(folder)
    dtype = dtype or stored_dtype(config, tensors)
    model = fill(abstract(spec, dtype, layout), tensors, lambda name: Source((name,)), at=str(folder))
    return Loaded(model, config, generation, folder)


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is no checkpoint")
    return read_json(folder / CONFIG)


def stored_dtype(config: dict[str, Any], tensors: Tensors) -> jnp.dtype:
    """The dtype that the config names, else that of most of the stored bytes."""
    name = config.get("dtype") or config.get("torch_dtype")
    if name is not None:
        return _dtype(str(name).removeprefix("torch."), f"{CONFIG}: dtype={name!r}")
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[str(info.dtype)] = sizes.get(str(info.dtype), 0) + info.nbytes
    most = max(sizes, key=sizes.__getitem__, default="float32")
    return jnp.dtype(most if most in DTYPES else "float32")


def _dtype(given: Any, at: str) -> jnp.dtype:
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or str(dtype) not in DTYPES:
        raise InputError(f"{at} must be one of {', '.join(DTYPES)}")
    return dtype
