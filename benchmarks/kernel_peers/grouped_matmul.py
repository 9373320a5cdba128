"""JAX's grouped matmul (megablox), at the tilings found best on v5e and v6e."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.cases import Case
from pallas_kernels.named import Call

# Rows, contraction and columns of a tile: the first three for many rows a group, the others for few.
TILINGS = (
    (512, 1024, 1024),
    (512, 2048, 1024),
    (512, 4096, 512),
    (128, 1024, 1024),
    (128, 2048, 768),
    (64, 2048, 1024),
)


def peer(case: Case) -> list[tuple[str, Call]]:
    """It needs a whole number of row tiles, and takes no int8."""
    if case.dtype != "bfloat16" or case.weight != "bfloat16":
        return []
    many = case.rows >= 128 * len(case.sizes)
    found = []
    for rows, inner, columns in TILINGS[:3] if many else TILINGS[3:]:
        tiling = min(rows, case.rows), min(inner, case.inner), min(columns, case.columns)
        name = "megablox " + "/".join(map(str, tiling))
        if case.rows % tiling[0] == 0 and name not in dict(found):
            found.append((name, _call(case, tiling)))
    return found


def _call(case: Case, tiling: tuple[int, int, int]) -> Call:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    ours = case.call()
    run = partial(gmm, preferred_element_type=jnp.bfloat16, tiling=tiling, transpose_rhs=case.transpose)

    def fn(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return run(lhs, rhs, sizes)

    return Call(fn, ours.args[:3], ours.work)
