"""Programs of known work, made by name in the compiler's process."""

import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import InputError
from pallas_kernels.named import Call, Work


def product(m: int, k: int, n: int, bm: int, bk: int, bn: int) -> Call:
    """A product of bfloat16 matrices in blocks, one step of the grid a block product."""

    def body(x, y, o, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == k // bk - 1)
        def _():
            o[...] = total[...].astype(o.dtype)

    fn = pl.pallas_call(
        body,
        grid=(m // bm, n // bn, k // bk),
        in_specs=[pl.BlockSpec((bm, bk), lambda i, j, s: (i, s)), pl.BlockSpec((bk, bn), lambda i, j, s: (s, j))],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    shapes = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
    return Call(fn, shapes, Work(2.0 * m * k * n, 2.0 * (m * k + k * n + m * n)))


def held(rows: int) -> tuple:
    """A kernel that holds rows x 512 bytes of VMEM, and little else."""

    def body(x, o, held):
        held[:8] = x[...]
        o[...] = held[:8] + 1

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    scratch = [pltpu.VMEM((rows, 128), jnp.float32)]
    params = pltpu.CompilerParams(vmem_limit_bytes=127 << 20)
    return pl.pallas_call(body, out_shape=shape, scratch_shapes=scratch, compiler_params=params), (shape,)


def counted(lengths: list[int]) -> tuple:
    """Reads as many blocks of 8 rows as the sum of the lengths, a scalar operand, says."""
    import numpy as np

    def body(lengths, x, o, block, arrived):
        for row in range(2):

            def step(i, _, row=row):
                copy = pltpu.make_async_copy(x.at[pl.ds(8 * (i + row), 8)], block, arrived)
                copy.start()
                copy.wait()
                o[...] += block[...]

            jax.lax.fori_loop(0, lengths[row], step, None)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((8, 128), lambda i, lengths: (0, 0)),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )
    fn = pl.pallas_call(body, grid_spec=spec, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    return fn, (np.array(lengths, np.int32), jax.ShapeDtypeStruct((1 << 16, 128), jnp.float32))


def refused() -> Call:
    raise InputError("rows=0, but at least one is needed.")


def broken() -> Call:
    raise ZeroDivisionError("a defect")


def fatal() -> Call:
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


def endless() -> Call:
    import time

    time.sleep(600)
    raise AssertionError


def nothing() -> int:
    return 0
