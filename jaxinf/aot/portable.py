"""Programs as StableHLO, which later versions of JAX compile, here or for another platform.

`jax.export.deserialize(bytes).call(*leaves)` runs one: its arguments are the leaves of the program's arguments in
their order, its results those of the program's results. What JAX promises of such files is in its documentation of
`jax.export`: later versions read them for six months. They hold no machine code and no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.errors import UnsupportedError


def check_portable() -> None:
    """Whether `jax.export` can write here.

    Raises:
      UnsupportedError: it needs flatbuffers, which is not installed.
    """
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnsupportedError(
            'the portable form needs flatbuffers, which is not installed: `pip install "jaxinf[portable]"`'
        ) from None


def exported(program: Any, args: tuple, static: Mapping[str, Any], platforms: Sequence[str]) -> bytes:
    """A jitted function for arguments of these shapes, lowered for each of the platforms ("cpu", "tpu", "cuda").

    Raises:
      UnsupportedError: `check_portable`, or it cannot be lowered for them.
    """
    check_portable()
    leaves, tree = jax.tree.flatten(args)

    def flat(*leaves):
        return jax.tree.leaves(program(*jax.tree.unflatten(tree, leaves), **static))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)) for x in leaves]
    try:
        return bytes(jax.export.export(jax.jit(flat), platforms=list(platforms))(*shapes).serialize())
    except (ValueError, NotImplementedError) as e:
        raise UnsupportedError(
            f"this program has no portable form for {', '.join(platforms)}: {' '.join(str(e).split())[:200]}"
        ) from e
