"""Whether a model can be loaded onto the devices that are here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinf.aot.plan import limits
from jaxinf.aot.plan import sizes as parts
from jaxinf.aot.plan.types import Case
from jaxinf.aot.slices import FACTS, GIB, Slice, named
from jaxinf.models import ModelSpec
from pallas_kernels import chips
from pallas_kernels.errors import InputError
from sharding import meshes

SMALLEST_CONTEXT = chips.LANES
"""Tokens: a cache holds whole tiles of them."""


def check_fits(
    spec: ModelSpec,
    devices: Sequence[Any],
    *,
    model: str = "the model",
    sizes: Mapping[str, int] | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> None:
    """Refuses a model whose weights and smallest cache are more than its devices have. Devices that tell nothing of
    their memory, and are no TPUs, pass.

    Args:
      devices: of the mesh, or the one device that the model is for.
      sizes: of the mesh's axes; None: no mesh.
      dtype, quantize: of the weights, as for a plan.

    Raises:
      InputError: it cannot fit; says by how much, and what would.
    """
    known = [found for found in map(memory, devices) if found is not None]
    if not known:
        return
    available, axes = min(known), dict(sizes or {})
    rows = axes.get("data", 1) * axes.get("expert", 1)
    context = min(SMALLEST_CONTEXT, spec.context)
    case = Case(model, spec, batch=rows, context=context, prompt=1, dtype=dtype, quantize=quantize)
    weights = sum(w.bytes for w in parts.weights(case, axes))
    cache = parts.cache_bytes(case, axes)
    if weights + cache <= available:
        return
    count = max(1, math.prod(axes.values()))
    on = f'mesh="{meshes.describe(axes)}"' if count > 1 else "one device"
    raise InputError(
        f"{model} cannot fit {on}: its weights take {_gib(weights)} a device and its smallest cache {_gib(cache)}, "
        f"but {devices[0].device_kind} has {_gib(available)}; take {_remedy(case, devices)}"
    )


def memory(device: Any) -> int | None:
    """Bytes that programs may use on a device: what it says itself, else what its kind has; None: not known."""
    try:
        stats = device.memory_stats() or {}
    except Exception:  # a platform that keeps no account
        stats = {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    chip = _chip(device)
    return None if chip is None else FACTS[chip].memory


def _chip(device: Any) -> str | None:
    return next((name for name, chip in chips.CHIPS.items() if device.device_kind in chip.kinds), None)


def _remedy(case: Case, devices: Sequence[Any]) -> str:
    chip = _chip(devices[0])
    if chip is None:
        return "more devices, or narrower weights"
    facts = FACTS[chip]
    count = max(1, len(devices) // facts.devices)
    shape = next((shape for _, shape in named(chip) if math.prod(shape) == count), (count, 1))
    where = Slice(f"{chip} x {count}", chips.CHIPS[chip], shape)
    advice = limits.remedy(case, where, {"tensor": 1})
    return re.sub(r"--quantize (\w+)", r'quantize="\1"', advice).replace("--tpu ", "a slice such as ")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
