"""From a folder to a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinf.checkpoint import own, published
from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families import FAMILIES
from jaxinf.checkpoint.folders import CONFIG, GENERATION, read_json
from jaxinf.checkpoint.names import Bound
from jaxinf.checkpoint.orbax import OrbaxTensors, open_orbax
from jaxinf.checkpoint.packing import Unpacked
from jaxinf.checkpoint.parameters import Planned, abstract, fill, planned
from jaxinf.checkpoint.progress import shown
from jaxinf.checkpoint.quantization import FORMAT_OF, Evened, Quantization, as_stored
from jaxinf.checkpoint.quantization import read as read_quantization
from jaxinf.checkpoint.restoring import restore_all
from jaxinf.checkpoint.rounding import Rounding, Rules, rounded
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
    quantize: str | None = None,
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
      quantize: round the matrices of attention and feed-forward layers to the nearest while they are read: "int8",
        "int4", ..., "w8a8"; as `jaxinf.compression.quantize` does it to a model in memory.
      progress: called with (bytes on the devices, bytes in all), both of this process; None: a bar on a terminal
        when it takes long.

    Raises:
      CheckpointError: what is there is not a whole checkpoint, or does not match its config.
      UnsupportedError: the config asks for maths that this build does not have.
      InputError: an unknown dtype, layout or scheme; a checkpoint that is quantised already is to be again; a mesh
        that there is not, or that does not divide the model.
    """
    folder = Path(folder)
    if dtype is not None:
        dtype = as_dtype(dtype, f"dtype={dtype!r}")
    if layout not in (None, "list", "stacked"):
        raise InputError(f'layout={layout!r} must be "list" or "stacked"')
    rounding = None if quantize is None else Rounding.of(quantize)
    config = read_config(folder)
    path = folder / GENERATION
    generation = read_json(path) if path.is_file() else {}
    opened = open_checkpoint(folder, config)
    dtype = dtype or opened.dtype
    mesh = None if mesh is None else mesh_for(opened.spec, mesh)
    staged = mesh is not None and mesh.shape["pipeline"] > 1
    layout = layout or ("list" if jax.default_backend() == "cpu" and not staged else "stacked")
    if rounding is None:
        model, plan = opened.plan(dtype, layout)
    else:
        model, plan = opened.plan_rounded(dtype, layout, lambda name: rounding)
    with shown(progress, f"loading {folder.name}") as progress:
        model = fill(model, plan, mesh=mesh, place=_placer(opened, rounding), progress=progress)
    return Loaded(model, config, generation, folder)


def _placer(opened: Opened, rounding: Rounding | None) -> Callable[..., Iterator[jax.Array]]:
    """What places arrays on a mesh: orbax itself, but for what it does not keep as the model has it."""
    if isinstance(opened.tensors, OrbaxTensors) and rounding is None:
        return functools.partial(restore_all, opened.tensors)
    if opened.config.get("weights") == "orbax" and jax.process_count() > 1:
        raise UnsupportedError(
            f"{opened.folder} is quantised, or to be, and kept by orbax, which several processes cannot read in "
            "parts; run `jaxinf convert` on it first"
        )
    return place_all


def read_spec(folder: str | Path) -> ModelSpec:
    """The architecture that a checkpoint's `config.json` describes; weights need not be there.

    Raises:
      CheckpointError, UnsupportedError: as `load`.
    """
    folder = Path(folder)
    config = read_config(folder)
    return _spec(config, folder / CONFIG)


def _spec(config: dict[str, Any], at: Path) -> ModelSpec:
    kind = config.get("model_type")
    if kind == own.MODEL_TYPE:
        return own.spec_of(config, at)
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted([*FAMILIES, own.MODEL_TYPE]))
        raise UnsupportedError(f"{at}: model_type={kind!r} is not supported; supported are {known}")
    reader = Config(config, str(at))
    try:
        spec = FAMILIES[kind].read(reader)
    except InputError as e:
        raise CheckpointError(f"{at} describes no model that can be built: {e}") from e
    reader.ignore(*published.KEYS)
    reader.finish()
    return spec


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers were read.

    names: which tensor is which parameter.
    """

    folder: Path
    config: dict[str, Any]
    spec: ModelSpec
    tensors: Tensors
    names: own.OwnNames | Bound
    quantization: Quantization | None

    @property
    def dtype(self) -> jnp.dtype:
        """That of what is not quantised."""
        return stored_dtype(self.config, self.tensors)

    def plan(self, dtype, layout: Layout) -> tuple[CausalLM, list[Planned]]:
        """The abstract model and what reads its arrays, as `planned` does."""
        model, tensors, at = abstract(self.spec, dtype, layout), self.tensors, str(self.folder)
        if self.quantization is not None:
            if layout == "stacked" and isinstance(self.names, own.OwnNames):
                tensors = Evened(tensors, model)
            model = as_stored(model, tensors, self.names.source, self.quantization, at)
        return model, planned(model, tensors, self.names.source, ignorable=self.names.ignorable, at=at)

    def check_plain(self) -> None:
        """
        Raises:
          InputError: it is quantised already.
        """
        if self.quantization is not None:
            raise InputError(
                f"{self.folder} is quantised already ({self.quantization.scheme}); give the original, or no scheme"
            )

    def plan_rounded(self, dtype, layout: Layout, rules: Rules) -> tuple[CausalLM, list[Planned]]:
        """The same with matrices rounded while they are read.

        Raises:
          InputError: they are quantised already, or as `rounded`.
        """
        self.check_plain()
        return rounded(*self.plan(dtype, layout), rules)


def open_checkpoint(folder: Path, config: dict[str, Any] | None = None) -> Opened:
    """The stored tensors, the architecture, and which tensor is which parameter."""
    config = read_config(folder) if config is None else config
    at = folder / CONFIG
    spec = _spec(config, at)
    if config["model_type"] == own.MODEL_TYPE:
        weights, quantization = config.get("weights", "safetensors"), read_quantization(config, at)
        if weights not in ("safetensors", "orbax"):
            raise CheckpointError(f'{at}: weights={weights!r} must be "safetensors" or "orbax"')
        tensors = open_orbax(folder) if weights == "orbax" else open_tensors(folder)
        tensors = tensors if quantization is None else Unpacked(tensors)
        return Opened(folder, config, spec, tensors, own.OwnNames(), quantization)
    family = FAMILIES[config["model_type"]].names(spec)
    tensors, quantization = published.opened(config, open_tensors(folder), at, transposed=family.transposed)
    return Opened(folder, config, spec, tensors, family.bind(spec, tensors), quantization)


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


def stored_format(config: dict[str, Any]) -> str | None:
    """The format of `jaxinf.quant.FORMATS` whose bytes quantised matrices take, about; None: they are not."""
    if config.get("model_type") == own.MODEL_TYPE:
        found = config.get("quantization")
        scheme = found.get("scheme") if isinstance(found, dict) else None
        return None if scheme is None else FORMAT_OF.get(scheme, scheme)
    return published.stored_format(config)


def as_dtype(given: Any, at: str) -> jnp.dtype:
    """A dtype that models come in, or an error that starts with `at`."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or str(dtype) not in DTYPES:
        raise InputError(f"{at} must be one of {', '.join(DTYPES)}")
    return dtype
