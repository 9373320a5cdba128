"""From a folder to a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinf.checkpoint import own
from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families import FAMILIES
from jaxinf.checkpoint.folders import CONFIG, GENERATION, read_json
from jaxinf.checkpoint.names import Bound
from jaxinf.checkpoint.orbax import OrbaxTensors, open_orbax
from jaxinf.checkpoint.parameters import abstract, fill
from jaxinf.checkpoint.progress import shown
from jaxinf.checkpoint.restoring import restore_all
from jaxinf.checkpoint.streaming import Progress, place_all
from jaxinf.checkpoint.tensors import Tensors, open_tensors
from jaxinf.models import CausalLM, ModelSpec
from jaxinf.models.causal_lm import Layout
from jaxinf.models.placing import mesh_for
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError

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


def load(
    folder: str | Path,
    *,
    dtype=None,
    layout: Layout | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Reads a checkpoint, tensor by tensor, straight into the dtype and layout asked for.

    On a mesh each process reads, of the stored tensors, the parts that its own devices hold. Where a family keeps
    queries, keys and values in one matrix, head by head, each process reads all of that matrix.

    Args:
      folder: of this project's form (`save`, `save_orbax`) or of Hugging Face's.
      dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's.
      layout: "list" or "stacked"; None: "list" on a CPU, "stacked" elsewhere and for stages of a pipeline.
      mesh: spread the model over it: "data=2,tensor=4", sizes by axis, a mesh, or "auto"; None: the first device.
      progress: called with (bytes on the devices, bytes in all), both of this process; None: a bar on a terminal
        when it takes long.

    Raises:
      CheckpointError: what is there is not a whole checkpoint, or does not match its config.
      UnsupportedError: the config asks for maths that this build does not have.
      InputError: an unknown dtype or layout; a mesh that there is not, or that does not divide the model.
    """
    folder = Path(folder)
    if dtype is not None:
        dtype = as_dtype(dtype, f"dtype={dtype!r}")
    if layout not in (None, "list", "stacked"):
        raise InputError(f'layout={layout!r} must be "list" or "stacked"')
    config = read_config(folder)
    path = folder / GENERATION
    generation = read_json(path) if path.is_file() else {}
    tensors, spec, names = open_checkpoint(folder, config)
    dtype = dtype or stored_dtype(config, tensors)
    mesh = None if mesh is None else mesh_for(spec, mesh)
    staged = mesh is not None and mesh.shape["pipeline"] > 1
    layout = layout or ("list" if jax.default_backend() == "cpu" and not staged else "stacked")
    model = abstract(spec, dtype, layout)
    with shown(progress, f"loading {folder.name}") as progress:
        model = fill(
            model,
            tensors,
            names.source,
            ignorable=names.ignorable,
            at=str(folder),
            mesh=mesh,
            place=functools.partial(restore_all, tensors) if isinstance(tensors, OrbaxTensors) else place_all,
            progress=progress,
        )
    return Loaded(model, config, generation, folder)


def read_spec(folder: str | Path) -> ModelSpec:
    """The architecture that a checkpoint's `config.json` describes; weights need not be there.

    Raises:
      CheckpointError, UnsupportedError: as `load`.
    """
    folder = Path(folder)
    config = read_config(folder)
    return _spec(config, folder / CONFIG)


def open_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[Tensors, ModelSpec, own.OwnNames | Bound]:
    """The stored tensors, the architecture, and which tensor is which parameter."""
    spec = _spec(config, folder / CONFIG)
    if config["model_type"] == own.MODEL_TYPE:
        weights = config.get("weights", "safetensors")
        if weights not in ("safetensors", "orbax"):
            raise CheckpointError(f'{folder / CONFIG}: weights={weights!r} must be "safetensors" or "orbax"')
        return open_orbax(folder) if weights == "orbax" else open_tensors(folder), spec, own.OwnNames()
    tensors = open_tensors(folder)
    return tensors, spec, FAMILIES[config["model_type"]].names(spec).bind(spec, tensors)


def _spec(config: dict[str, Any], at: Path) -> ModelSpec:
    kind = config.get("model_type")
    if kind == own.MODEL_TYPE:
        return own.spec_of(config, at)
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted([*FAMILIES, own.MODEL_TYPE]))
        raise UnsupportedError(f"{at}: model_type={kind!r} is not supported; supported are {known}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"{at}: quantization_config says that the weights are stored as {method!r}; "
            "take the bfloat16 form of the checkpoint"
        )
    reader = Config(config, str(at))
    try:
        spec = FAMILIES[kind].read(reader)
    except InputError as e:
        raise CheckpointError(f"{at} describes no model that can be built: {e}") from e
    reader.finish()
    return spec


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
        name = str(name).removeprefix("torch.")
        if name not in DTYPES:
            known = ", ".join(DTYPES)
            raise CheckpointError(f"{CONFIG} names dtype={name!r}, where {known} are known; give dtype=")
        return jnp.dtype(name)
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[str(info.dtype)] = sizes.get(str(info.dtype), 0) + info.nbytes
    most = max(sizes, key=sizes.__getitem__, default="float32")
    return jnp.dtype(most if most in DTYPES else "float32")


def as_dtype(given: Any, at: str) -> jnp.dtype:
    """A dtype that models come in, or an error that starts with `at`."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or str(dtype) not in DTYPES:
        raise InputError(f"{at} must be one of {', '.join(DTYPES)}")
    return dtype
