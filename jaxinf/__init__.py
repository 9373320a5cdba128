"""Language-model inference on TPUs in JAX. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinf.generation import SamplingParams, decode_step, prefill
    from jaxinf.lm import LM, Completion
    from jaxinf.models import CausalLM, ModelSpec
    from pallas_kernels.errors import CheckpointError, InputError, JaxinfError, UnsupportedError

    __version__: str

__all__ = [
    "LM",
    "CausalLM",
    "CheckpointError",
    "Completion",
    "InputError",
    "JaxinfError",
    "ModelSpec",
    "SamplingParams",
    "UnsupportedError",
    "decode_step",
    "prefill",
]

_HOMES = {
    "LM": "jaxinf.lm",
    "CausalLM": "jaxinf.models",
    "CheckpointError": "pallas_kernels.errors",
    "Completion": "jaxinf.lm",
    "InputError": "pallas_kernels.errors",
    "JaxinfError": "pallas_kernels.errors",
    "ModelSpec": "jaxinf.models",
    "SamplingParams": "jaxinf.generation",
    "UnsupportedError": "pallas_kernels.errors",
    "decode_step": "jaxinf.generation",
    "prefill": "jaxinf.generation",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'jaxinf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("jaxinf")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
