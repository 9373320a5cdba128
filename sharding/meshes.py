"""Meshes by name: "data=2,tensor=4"."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.errors import InputError
from sharding.collectives import AXES


def parse(text: str) -> dict[str, int]:
    """The sizes of all axes that a description such as "data=2,tensor=4" gives; those it leaves out have 1.

    Raises:
      InputError: an unknown axis, one given twice, or a size that is no whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (part.strip() for part in item.partition("="))
        if name not in AXES:
            raise InputError(f'mesh="{text}" names the axis {name!r}; axes are {", ".join(AXES)}')
        if name in sizes:
            raise InputError(f'mesh="{text}" gives {name} twice')
        if not re.fullmatch(r"[1-9]\d*", size):
            raise InputError(f'mesh="{text}" gives {name} the size {size!r}, which must be a whole number above 0')
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def describe(sizes: Mapping[str, int]) -> str:
    """The inverse of `parse`: the axes that have more than one chip, or "tensor=1"."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "tensor=1"


def make(mesh: str | Mapping[str, int] | Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of `AXES`.

    Args:
      mesh: a description, sizes by axis, or a mesh, which may leave axes out or have them in another order.
      devices: default: all there are. A smaller mesh takes the first ones, and says so in a warning.

    Raises:
      InputError: it needs more devices than there are, or has an unknown axis.
    """
    if isinstance(mesh, Mesh):
        if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
            raise InputError(f"the mesh has the axis {unknown[0]!r}; axes are {', '.join(AXES)}")
        order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
        shape = [mesh.shape.get(axis, 1) for axis in AXES]
        return Mesh(np.asarray(mesh.devices).transpose(order).reshape(shape), AXES)
    sizes = parse(mesh) if isinstance(mesh, str) else parse(",".join(f"{k}={v}" for k, v in mesh.items()))
    found = list(jax.devices() if devices is None else devices)
    count = math.prod(sizes.values())
    if count > len(found):
        raise InputError(
            f'mesh="{describe(sizes)}" needs {count} devices, but there are {len(found)}; '
            "for tests on a CPU more can be emulated with XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count}"
        )
    if count < len(found):
        warnings.warn(f'mesh="{describe(sizes)}" takes the first {count} of {len(found)} devices', stacklevel=2)
    shape = [sizes[axis] for axis in AXES]
    return Mesh(_arranged(found[:count], shape), AXES)


def _arranged(devices: list[Any], shape: list[int]) -> np.ndarray:
    """The devices so that the last axes run along the shortest wires, where their coordinates are known."""
    if len(devices) > 1 and getattr(devices[0], "platform", None) == "tpu":
        from jax.experimental import mesh_utils

        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (NotImplementedError, ValueError, AssertionError):
            pass  # a part of a slice that is no box
    return np.array(devices).reshape(shape)
