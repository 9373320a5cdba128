"""From the name of a model to its architecture, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxinf.checkpoint.folders import CONFIG
from jaxinf.checkpoint.loading import read_config, read_spec, stored_dtype, stored_format
from jaxinf.checkpoint.tensors import Tensors, open_tensors
from jaxinf.lm.locate import EMBEDDED, embedded, fetch_config, is_hub_id
from jaxinf.models import ModelSpec, presets
from pallas_kernels.errors import InputError

PRESET_DTYPE = "bfloat16"
"""What most published weights are in; a preset says nothing of it."""


@dataclass(frozen=True)
class Architecture:
    """What a model is.

    dtype: of its weights, where they are; else what its config says.
    quantize: the format that its matrices are kept in; None: they are in dtype.
    folder: the checkpoint's; None where there are no weights to load.
    """

    spec: ModelSpec
    dtype: str
    folder: Path | None
    quantize: str | None = None


def architecture(name: str | Path, *, fetch: bool = False) -> Architecture:
    """The architecture of an embedded model, a checkpoint folder, a `config.json`, or a preset.

    Weights need not be there; their headers are read where the config names no dtype.

    Args:
      fetch: whether owner/name may be looked up on the Hugging Face Hub, of which the config alone is fetched.

    Raises:
      InputError: an unknown name; the message says which exist.
      CheckpointError, UnsupportedError: as `checkpoint.load`.
    """
    text = str(name)
    path = EMBEDDED / text if text in embedded() else Path(text).expanduser()
    if path.is_dir():
        return Architecture(read_spec(path), _dtype(path, weights=True), path, stored_format(read_config(path)))
    if path.is_file():
        if path.name != CONFIG:
            raise InputError(f"{text} is neither a folder nor a {CONFIG}; give one of these")
        return Architecture(read_spec(path.parent), _dtype(path.parent, weights=False), None)
    if text in presets.names():
        return Architecture(presets.preset(text), PRESET_DTYPE, None)
    if fetch and not isinstance(name, Path) and is_hub_id(text):
        folder = fetch_config(text)
        return Architecture(read_spec(folder), _dtype(folder, weights=False), None)
    raise InputError(
        f"there is no model {text!r}: embedded models are {', '.join(embedded()) or 'none'}; presets are "
        f"{', '.join(presets.names())}; else give a folder or the path of a {CONFIG}"
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights as files have them."""
    if read_config(folder).get("weights") == "orbax":
        return sum(path.stat().st_size for path in (folder / "weights").rglob("*") if path.is_file())
    return sum(info.nbytes for info in open_tensors(folder).values())


def _dtype(folder: Path, *, weights: bool) -> str:
    config = read_config(folder)
    named = config.get("dtype") or config.get("torch_dtype")
    tensors = open_tensors(folder) if weights and not named else Tensors({})
    return str(stored_dtype(config, tensors))
