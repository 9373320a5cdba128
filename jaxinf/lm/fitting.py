"""Refuses to load what cannot fit, before any of it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxinf.lm.architecture import architecture
from jaxinf.models.placing import mesh_for


def check(
    folder: Path,
    *,
    dtype: str | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
    quantize: str | None = None,
    devices: Sequence[Any] | None = None,
) -> None:
    """Whether the checkpoint's weights and a smallest cache fit the TPUs that they are for.

    Args:
      dtype, mesh, quantize: as for `LM.from_pretrained`.
      devices: default: those of JAX. Only TPUs are asked.

    Raises:
      InputError: they cannot; says by how much, and what would help.
    """
    found = list(jax.devices() if devices is None else devices)
    if found[0].platform != "tpu":
        return
    from jaxinf.aot.plan import check_fits  # all of it is arithmetic, but slow to import

    what = architecture(folder)
    sizes = None
    if mesh is not None:
        made = mesh_for(what.spec, mesh)
        found, sizes = list(made.devices.flat), dict(made.shape)
    check_fits(
        what.spec,
        found if sizes else found[:1],
        model=folder.name,
        sizes=sizes,
        dtype=dtype or what.dtype,
        quantize=quantize or what.quantize,
    )
