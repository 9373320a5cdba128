"""Every kernel at its named shapes, through the TPU compiler: what the interpreter cannot see.

Memory that overflows, layouts and tilings that the compiler does not take, sharded programs that it refuses. The
quick tests compile a few cases of each op for each chip, others for each chip; the slow ones compile all.
"""

import dataclasses

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import PATHS, compiles

from jaxinf.aot import Job, case_job, cases, lower, run, topology
from pallas_kernels import chips
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_decode import flash_decode

pytestmark = compiles
CHIPS = ("v5e", "v6e", "v5p", "7x")


def distinct(op: str) -> list[str]:
    """Names of the op's cases; of those that differ in nothing else, the first."""
    found: dict[str, str] = {}
    for name, case in cases.models(op).items():
        found.setdefault(repr(dataclasses.replace(case, name="")), name)
    return list(found.values())


def fits(job: Job, chip: str) -> bool:
    """Whether the arguments and as much again, for results, fit the chip's HBM."""
    args = jax.tree.leaves(job.make().args)
    return 2 * sum(a.size * a.dtype.itemsize for a in args) <= chips.find(chip).hbm


def refusals(jobs: list[Job], chip: str) -> list[str]:
    """A line for each job that does not compile."""
    outcomes = run(jobs, chip, static=False, paths=PATHS)
    return [f"{tuple(o.job.arguments.values())[:2]}: {o.kind}: {o.error}" for o in outcomes if o.report is None]


def test_every_op_has_cases() -> None:
    assert {op: bool(cases.models(op)) for op in cases.ops()} == dict.fromkeys(cases.ops(), True)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_case_of_each_op(chip: str) -> None:
    jobs = []
    for op in cases.ops():
        fitting = [job for job in (case_job(op, name) for name in distinct(op)) if fits(job, chip)]
        jobs.append(fitting[CHIPS.index(chip) * len(fitting) // len(CHIPS)])
    assert refusals(jobs, chip) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", cases.ops())
@pytest.mark.parametrize("chip", CHIPS)
def test_every_case(chip: str, op: str) -> None:
    jobs = [case_job(op, name) for name in distinct(op)]
    assert refusals([job for job in jobs if fits(job, chip)], chip) == []


@pytest.mark.parametrize("op", cases.ops())
def test_a_kernel_on_every_chip_of_a_sharded_program(op: str) -> None:
    mesh = topology.mesh("v5e", (4,), ("tensor",))
    call = cases.call(op, distinct(op)[0])
    everywhere = PartitionSpec()
    local = jax.shard_map(call.fn, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    assert lower(local, *call.args, mesh=mesh).devices == 4


def heads_sharded(mesh: jax.sharding.Mesh, *size: int) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec(None, "tensor")
    return jax.ShapeDtypeStruct(size, jax.numpy.bfloat16, sharding=NamedSharding(mesh, spec))


def test_attention_over_sharded_heads() -> None:
    mesh = topology.mesh("v6e", (4,), ("tensor",))
    spec = PartitionSpec(None, "tensor")
    q, k = heads_sharded(mesh, 1, 32, 1024, 128), heads_sharded(mesh, 1, 8, 1024, 128)
    local = jax.shard_map(flash_attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    compiled = lower(local, q, k, k, mesh=mesh)
    assert compiled.memory.arguments == (32 + 8 + 8) // 4 * 1024 * 128 * 2
    assert compiled.collectives == ()


def test_decoding_over_sharded_heads() -> None:
    mesh = topology.mesh("v6e", (4,), ("tensor",))
    spec, everywhere = PartitionSpec(None, "tensor"), PartitionSpec()
    q, k = heads_sharded(mesh, 8, 32, 1, 128), heads_sharded(mesh, 8, 8, 2048, 128)
    specs = (spec, spec, spec, everywhere)
    local = jax.shard_map(flash_decode, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    compiled = lower(local, q, k, k, jax.ShapeDtypeStruct((8,), jax.numpy.int32), mesh=mesh)
    assert compiled.collectives == ()


def test_a_kernel_is_not_partitioned_by_itself() -> None:
    mesh = topology.mesh("v5e", (4,), ("tensor",))
    q, k = heads_sharded(mesh, 1, 32, 1024, 128), heads_sharded(mesh, 1, 8, 1024, 128)
    with pytest.raises(UnsupportedError, match="partition"):
        lower(flash_attention, q, k, k, mesh=mesh)
