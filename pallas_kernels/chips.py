"""Facts about TPU chips, and which chip a program is being traced for.

Sources: peak rates, memory and bandwidth from Google's system-architecture pages (cloud.google.com/tpu/docs: v4,
v5e, v5p, v6e, tpu7x); cores, matrix units, VMEM and SMEM of a core from `pltpu.TpuInfo` (JAX 0.10). The clock
follows from them: peak = cores x units x multiply-adds a cycle x 2 x clock.
"""

from dataclasses import dataclass

import jax

from pallas_kernels.errors import InputError

MIB = 1 << 20
LANES = 128  # numbers side by side in a vector register, of all chips


@dataclass(frozen=True)
class Chip:
    """One chip: rates and memories are of the whole chip, units, VMEM and SMEM of one core."""

    name: str
    kinds: tuple[str, ...]  # what JAX calls such a device
    topology: str  # the smallest slice that the compiler describes
    accelerator: str  # that slice as libtpu's TPU_ACCELERATOR_TYPE
    bf16: float  # FLOP/s; a multiplication and an addition are two
    int8: float  # operations/s
    hbm: float  # bytes
    bandwidth: float  # bytes/s
    vmem: int  # bytes
    smem: int  # bytes
    cores: int
    megacore: bool  # one program runs on both cores
    mxus: int
    mxu: int  # rows and columns of a matrix unit
    macs: int  # multiply-adds a cycle of one unit, bfloat16

    @property
    def clock(self) -> float:
        """Hz."""
        return self.bf16 / (self.cores * self.mxus * self.macs * 2)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            kinds=("TPU v4",),
            topology="v4:2x2x1",
            accelerator="v4-8",
            bf16=275e12,
            int8=275e12,
            hbm=32e9,
            bandwidth=1228e9,
            vmem=16 * MIB,
            smem=1 * MIB,
            cores=2,
            megacore=True,
            mxus=4,
            mxu=128,
            macs=128 * 128,
        ),
        Chip(
            name="v5e",
            kinds=("TPU v5 lite", "TPU v5e"),
            topology="v5e:2x2",
            accelerator="v5litepod-4",
            bf16=197e12,
            int8=394e12,
            hbm=16e9,
            bandwidth=819e9,
            vmem=128 * MIB,
            smem=1 * MIB,
            cores=1,
            megacore=False,
            mxus=4,
            mxu=128,
            macs=128 * 128,
        ),
        Chip(
            name="v5p",
            kinds=("TPU v5", "TPU v5p"),
            topology="v5p:2x2x1",
            accelerator="v5p-8",
            bf16=459e12,
            int8=918e12,
            hbm=95e9,
            bandwidth=2765e9,
            vmem=64 * MIB,
            smem=1 * MIB,
            cores=2,
            megacore=True,
            mxus=4,
            mxu=128,
            macs=128 * 128,
        ),
        Chip(
            name="v6e",
            kinds=("TPU v6 lite", "TPU v6e"),
            topology="v6e:2x2",
            accelerator="v6e-4",
            bf16=918e12,
            int8=1836e12,
            hbm=32e9,
            bandwidth=1640e9,
            vmem=128 * MIB,
            smem=1 * MIB,
            cores=1,
            megacore=False,
            mxus=2,
            mxu=256,
            macs=2 * 256 * 256,
        ),
        Chip(
            name="7x",
            kinds=("TPU7x",),
            topology="tpu7x:2x2x1",
            accelerator="tpu7x-8",
            bf16=2307e12,
            int8=2307e12,
            hbm=192e9,
            bandwidth=7380e9,
            vmem=64 * MIB,
            smem=1 * MIB,
            cores=2,
            megacore=False,
            mxus=2,
            mxu=256,
            macs=2 * 256 * 256,
        ),
    )
}


def find(name: str) -> Chip:
    """The chip of that name ("v7x" and "tpu7x" mean "7x").

    Raises:
      InputError: no such chip is described here.
    """
    key = name.lower().removeprefix("tpu").lstrip(" -")
    chip = CHIPS.get(key) or CHIPS.get(key.removeprefix("v"))
    if chip is None:
        raise InputError(f"chip={name!r}, but only {', '.join(CHIPS)} are described.")
    return chip


def current() -> Chip:
    """The chip that a program is traced for: of the mesh in context, else of the default device, else the v5e.

    Without a TPU in sight there is nothing to learn; the v5e's block sizes fit every newer chip as well.
    """
    kind = _kind_in_context() or jax.devices()[0].device_kind
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), CHIPS["v5e"])


def platform() -> str:
    """The platform that a program is traced for, by the same rule: "tpu", "cpu", "gpu"."""
    kind = _kind_in_context()
    return "tpu" if kind is not None and kind.startswith("TPU") else jax.default_backend()


def _kind_in_context() -> str | None:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return None if device is None else device.device_kind
