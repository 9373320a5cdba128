"""Compiles a function for chips that are not here."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinf.aot import collectives, memory, topology
from jaxinf.aot.failures import explain


@dataclass(frozen=True)
class Compiled:
    """A program of the TPU compiler. It can be read, saved and measured, but not run here.

    Attributes:
      chip: the slice's name.
      jaxpr: what was traced, closed.
      executable: JAX's `Compiled`.
      devices: that it runs on.
      cores: of each device's chip, that it runs on.
      compile_seconds: tracing and lowering included.
    """

    chip: str
    jaxpr: Any
    executable: Any
    devices: int
    cores: int
    compile_seconds: float

    @cached_property
    def text(self) -> str:
        """The optimised HLO."""
        return self.executable.as_text()

    @property
    def memory(self) -> memory.Memory:
        return memory.of(self.executable)

    @property
    def collectives(self) -> tuple[collectives.Collective, ...]:
        return collectives.of(self.text) if self.devices > 1 else ()

    @property
    def cost(self) -> dict[str, float]:
        """XLA's own count of FLOP ("flops") and bytes ("bytes accessed"); the body of a loop counts once."""
        return dict(self.executable.cost_analysis() or {})


def lower(
    fn: Callable[..., Any], *args: Any, chip: str = "v5e", mesh: Mesh | None = None, donate: Sequence[int] = ()
) -> Compiled:
    """Compiles `fn(*args)` with the TPU compiler.

    Ops know the chip while tracing (`pallas_kernels.chips.current`) and take their kernels.

    Args:
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s, of which only shape, dtype, sharding and layout matter.
        What has no sharding on described devices is replicated over the mesh.
      chip: "v5e", "v6e", ... or a slice, "v5e:4x4".
      mesh: of described devices (`topology.mesh`); default: one device of the chip.
      donate: positions of arguments whose memory the results may take.

    Raises:
      UnsupportedError: libtpu is not installed, or the compiler refuses the program.
      TooLarge: it needs more VMEM, SMEM or HBM than there is.
      InputError: no such chip or topology.
    """
    mesh = mesh or topology.mesh(chip)
    described = set(mesh.devices.flat)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        here = sharding is not None and sharding.device_set <= described
        placed = sharding if here else everywhere
        layout = getattr(getattr(leaf, "format", None), "layout", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=Format(layout, placed) if layout else placed)

    began = time.monotonic()
    try:
        with use(mesh):
            traced = jax.jit(fn, donate_argnums=tuple(donate)).trace(*jax.tree.map(shape, args))
            executable = traced.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:
        known = explain(error)
        if known is None or known is error:
            raise
        raise known from error
    cores = getattr(mesh.devices.flat[0], "num_cores", 1) or 1
    return Compiled(chip, traced.jaxpr, executable, mesh.size, cores, time.monotonic() - began)


def use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Tracing in this context is for the mesh's chip."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
