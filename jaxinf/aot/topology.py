"""Chips that are not here: libtpu describes their topologies and compiles for them on a host without a TPU."""

import math
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pallas_kernels import chips
from pallas_kernels.chips import Chip
from pallas_kernels.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True)
class Slice:
    """Chips of one kind wired as `topology` says, such as "v5e:4x4"."""

    chip: Chip
    topology: str

    @property
    def size(self) -> int:
        """Chips."""
        return _size(self.topology)

    @property
    def accelerator(self) -> str:
        """Its TPU_ACCELERATOR_TYPE, which libtpu wants to know before it is loaded."""
        kind, _, count = self.chip.accelerator.rpartition("-")
        return f"{kind}-{int(count) * self.size // _size(self.chip.topology)}"


def _size(topology: str) -> int:
    return math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def find(name: str) -> Slice:
    """The slice of that name: a chip ("v6e": the smallest slice), or a chip and a topology ("v6e:4x4").

    Raises:
      InputError: no such chip, or no topology.
    """
    kind, _, shape = name.partition(":")
    chip = chips.find(kind)
    if not shape:
        return Slice(chip, chip.topology)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise InputError(f"topology={shape!r} of {name!r}, but sizes such as 4x4 or 2x2x1 are needed.")
    return Slice(chip, chip.topology.partition(":")[0] + ":" + shape)


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
