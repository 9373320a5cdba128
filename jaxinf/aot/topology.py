"""Chips that are not here: libtpu describes their topologies and compiles for them on a host without a TPU."""

import math
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from jaxinf.aot.slices import Slice, find
from pallas_kernels.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from jax.sharding import Mesh


def compiler() -> str:
    """The version of the TPU compiler, such as "libtpu 0.0.42.1".

    Raises:
      UnsupportedError: it is not installed.
    """
    try:
        return f"libtpu {version('libtpu')}"
    except PackageNotFoundError:
        raise UnsupportedError(
            'the TPU compiler is part of libtpu, which is not installed: `pip install "jaxinf[tpu]"` (Linux only).'
        ) from None


def available() -> bool:
    """Whether the TPU compiler is installed."""
    try:
        compiler()
    except UnsupportedError:
        return False
    return True


def environment(where: Slice) -> dict[str, str]:
    """Variables under which libtpu compiles for this slice without looking for a TPU. Set before it is loaded."""
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": where.accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time
    }


@cache
def devices(name: str) -> tuple[Any, ...]:
    """The described devices of a slice: its chips, or on a 7x its cores.

    Raises:
      InputError: no such chip or topology.
      UnsupportedError: libtpu is not installed.
    """
    where = find(name)
    compiler()
    for key, value in environment(where).items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(where.topology, "tpu").devices)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name!r} is no slice that the compiler can describe: {reason}") from error


def mesh(name: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("x",)) -> "Mesh":
    """A `jax.sharding.Mesh` of described devices, the first ones of the slice, with Auto axes.

    Raises:
      InputError: the slice has fewer devices than the mesh.
    """
    import numpy as np
    from jax.sharding import Mesh

    found, count = devices(name), math.prod(shape)
    if count > len(found):
        raise InputError(f"mesh={shape} needs {count} devices, but {name!r} has {len(found)}.")
    return Mesh(np.array(found[:count]).reshape(shape), axes)
