"""Programs over meshes of the emulated devices, for tests."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from sharding.collectives import AXES


def mesh(**sizes: int) -> Mesh:
    shape = [sizes.get(axis, 1) for axis in AXES]
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), AXES)


def over(where: Mesh, function, in_specs, out_specs):
    """`function` run by every chip of a mesh on its parts, jitted."""
    return jax.jit(jax.shard_map(function, mesh=where, in_specs=in_specs, out_specs=out_specs, check_vma=False))
