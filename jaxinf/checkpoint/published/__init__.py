"""Published forms of quantised weights: each is seen as arrays of `QTensor`s under the name of the matrix.

A matrix that would be `x.weight [out, in]` becomes `x.weight.values [out, in]`, `x.weight.scales [out]` or
`[out, groups]`, `x.weight.zeros [out, groups]`, `x.weight.codebook`, `x.weight.order`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.published import awq, bitsandbytes, compressed_tensors, gptq, mxfp4
from jaxinf.checkpoint.published.decoded import Decoded, Decoding
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import Tensors
from pallas_kernels.errors import CheckpointError, UnsupportedError

KEYS = ("quantization_config", "compression_config")
"""Keys of `config.json`; the second is what compressed-tensors first called it."""
METHODS: Mapping[str, Callable[[Config, Tensors], Decoding]] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
}
"""By `quant_method`."""


def stored_format(config: Mapping[str, Any]) -> str | None:
    """The format that the matrices take about as many bytes as; None: they are not quantised."""
    section = next((config[key] for key in KEYS if config.get(key)), None)
    if not isinstance(section, dict):
        return None
    bits = section.get("bits", 4 if section.get("load_in_4bit") else None)
    for group in (section.get("config_groups") or {}).values():
        bits = (group.get("weights") or {}).get("num_bits", bits) if isinstance(group, dict) else bits
    if section.get("quant_method") == "mxfp4":
        return "mxfp4"
    return "int4" if isinstance(bits, int) and bits <= 4 else "int8"


def opened(
    config: Mapping[str, Any], tensors: Tensors, at: Path, *, transposed: bool = False
) -> tuple[Tensors, Quantization | None]:
    """The tensors of a published checkpoint, as arrays of `QTensor`s where its config says that they are quantised.

    transposed: the family stores its matrices `[in, out]`.

    Raises:
      UnsupportedError: a method, or a way of it, that is not read.
      CheckpointError: the config does not say what it must, or the tensors are not what it says.
    """
    found = next(((key, config[key]) for key in KEYS if config.get(key)), None)
    if found is None:
        return tensors, None
    key, section = found
    if not isinstance(section, dict):
        raise CheckpointError(f"{at}: {key}={section!r} must be an object")
    method = section.get("quant_method", "compressed-tensors" if key == KEYS[1] else None)
    if method not in METHODS:
        raise UnsupportedError(
            f"{at}: {key} says that the weights are stored as {method!r}, which is not read; "
            f"{', '.join(METHODS)} are: take one of these, or the bfloat16 form of the checkpoint"
        )
    if transposed:
        raise UnsupportedError(
            f"{at}: {method} weights of this family, which stores its matrices [in, out], are not read; take the "
            "plain form of the checkpoint"
        )
    decoding = METHODS[method](Config(section, f"{at}: {key}"), tensors)
    if not decoding.arrays:
        raise CheckpointError(
            f"{at}: {key} says that weights are stored as {method!r}, but none is; the checkpoint is not whole"
        )
    return Decoded(tensors, decoding), decoding.quantization
