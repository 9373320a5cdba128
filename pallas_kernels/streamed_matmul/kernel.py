"""`streamed_matmul` as TPU kernels: one that starts the copies of the first tiles, and one that multiplies.

The first gives the buffers that the tiles arrive in and the semaphores that tell of it, and does not wait; what
runs between the two (a sum over chips) runs beside the copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import current
from pallas_kernels.stacks import in_hbm
from pallas_kernels.streamed_matmul.blocks import Blocks, Problem, vmem_bytes
from pallas_kernels.vmem import limit

_HBM, _VMEM, _FLAGS = (pl.BlockSpec(memory_space=s) for s in (pltpu.HBM, pltpu.VMEM, pltpu.SEMAPHORE))
_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a call, in the order in which they are used.

    counts: of each weight, how many come before the kernel that multiplies.
    """

    problem: Problem
    blocks: Blocks
    counts: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Tiles of a weight."""
        return self.problem.inner // self.blocks.k

    @property
    def early(self) -> list[int]:
        """Weights of which tiles come before."""
        return [i for i, count in enumerate(self.counts) if count]

    @property
    def late(self) -> list[int]:
        """Weights of which tiles come during the products."""
        return [i for i, count in enumerate(self.counts) if count < self.steps]

    @property
    def ring(self) -> int:
        return min([self.blocks.ring, *(self.steps - self.counts[i] for i in self.late)])

    def buffer(self, weight: int) -> tuple[int, int]:
        """Shape of what the early tiles of a weight arrive in."""
        return self.counts[weight] * self.blocks.k, self.problem.columns[weight]

    def rows(self, tile: Any) -> Any:
        return pl.ds(pl.multiple_of(tile * self.blocks.k, self.blocks.k), self.blocks.k)


def fetch(weights, layer, after: jax.Array, tiles: Tiles, *, interpret: bool):
    """Starts to copy the early tiles of `weights`, each `[L, K, N]`.

    Returns `(buffers, semaphores, after)`; of the interpreter, which knows no semaphores that outlive a kernel,
    tiles that have come and no semaphores.
    """
    early, dtype = tiles.early, weights[0].dtype
    buffers = [pltpu.VMEM(tiles.buffer(i), dtype) for i in early]
    flags = [pltpu.SemaphoreType.DMA((tiles.counts[i],)) for i in early]
    n = len(early)
    left = [] if interpret else flags
    made = pl.pallas_call(
        partial(_fetch, tiles=tiles, wait=interpret),
        out_shape=(*buffers, *left, jax.ShapeDtypeStruct(after.shape, after.dtype)),
        in_specs=[_SMEM, *[_HBM] * n, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=(*[_VMEM] * n, *[_FLAGS] * len(left), pl.BlockSpec(memory_space=pl.ANY)),
        scratch_shapes=flags if interpret else [],
        input_output_aliases={n + 1: n + len(left)},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        interpret=interpret,
        name="fetch",
    )(layer, *(in_hbm(weights[i], interpret) for i in early), after)
    return tuple(made[:n]), tuple(made[n:-1]), made[-1]


def _fetch(layer, *refs, tiles: Tiles, wait: bool):
    n = len(tiles.early)
    sources, rest = refs[:n], refs[n + 1 :]
    buffers, flags = rest[:n], rest[n + 1 :] if wait else rest[n:-1]
    start(tiles, layer[0], sources, buffers, flags)
    if wait:
        for at, weight in enumerate(tiles.early):
            for tile in range(tiles.counts[weight]):
                _early(tiles, buffers[at], flags[at], tile).wait()


def start(tiles: Tiles, layer, sources, buffers, flags) -> None:
    """Starts the copies of all early tiles; sources, buffers and flags are those of `tiles.early`."""
    for at, weight in enumerate(tiles.early):
        for tile in range(tiles.counts[weight]):
            rows = tiles.rows(tile)
            pltpu.make_async_copy(
                sources[at].at[layer, rows, :], buffers[at].at[rows, :], flags[at].at[tile]
            ).start()


def _early(tiles: Tiles, buffer, flags, tile):
    """The copy of an early tile, to be waited for: only its size counts."""
    here = buffer.at[tiles.rows(tile), :]
    return pltpu.make_async_copy(here, here, flags.at[tile])


def multiply(x, weights, scales, layer, buffers, flags, tiles: Tiles, *, out_dtype, interpret: bool):
    """`[M, K]`, each weight `[L, K, N]`, each of scales float32 `[L, 1, N]` or None -> each `[M, N]`."""
    p = tiles.problem
    scales = [] if scales is None else scales
    return pl.pallas_call(
        partial(_multiply, tiles=tiles, wait=bool(flags), scaled=bool(scales)),
        out_shape=tuple(jax.ShapeDtypeStruct((p.rows, n), out_dtype) for n in p.columns),
        in_specs=[
            _SMEM,
            _VMEM,
            *[_HBM] * (len(weights) + len(scales)),
            *[_VMEM] * len(buffers),
            *[_FLAGS] * len(flags),
        ],
        out_specs=tuple(_VMEM for _ in p.columns),
        scratch_shapes=scratch(tiles, weights[0].dtype, scaled=bool(scales)),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit(current(), vmem_bytes(p, tiles.blocks))),
        interpret=interpret,
        name="streamed_matmul",
    )(layer, x, *(in_hbm(a, interpret) for a in (*weights, *scales)), *buffers, *flags)


def scratch(tiles: Tiles, dtype, scaled: bool = False) -> list:
    """What the kernel holds besides its operands: rings, sums, scales, and semaphores of copies of both."""
    columns = tiles.problem.columns
    return [
        *(pltpu.VMEM((tiles.ring, tiles.blocks.k, columns[i]), dtype) for i in tiles.late),
        *(pltpu.VMEM((tiles.problem.rows, n), jnp.float32) for n in columns),
        *(pltpu.VMEM((1, n), jnp.float32) for n in columns if scaled),
        pltpu.SemaphoreType.DMA((max(1, len(tiles.late)), max(1, tiles.ring))),
        pltpu.SemaphoreType.DMA(()),
    ]


def _multiply(layer, x, *refs, tiles: Tiles, wait: bool, scaled: bool):
    taken = iter(refs)

    def take(count):
        return [next(taken) for _ in range(count)]

    n, early, late = len(tiles.counts), len(tiles.early), len(tiles.late)
    weights, scales, buffers = take(n), take(n * scaled), take(early)
    flags, outs, rings = take(early * wait), take(n), take(late)
    sums, factors = take(n), take(n * scaled)
    Products(tiles, layer[0], x, weights, scales, buffers, flags, outs, rings, sums, factors, *taken).run()


@dataclass(frozen=True)
class Products:
    """The body: every operand and buffer of the kernel."""

    tiles: Tiles
    layer: Any
    x: Any
    weights: Sequence[Any]
    scales: Sequence[Any]
    buffers: Sequence[Any]
    flags: Sequence[Any]
    outs: Sequence[Any]
    rings: Sequence[Any]
    sums: Sequence[Any]
    factors: Sequence[Any]
    arrived: Any
    factors_arrived: Any

    def run(self) -> None:
        t = self.tiles
        for copy in self.of_factors():
            copy.start()
        for tile in range(t.ring if t.late else 0):
            self.copy(0, t.counts[t.late[0]] + tile).start()
        for weight in range(len(t.counts)):
            self.sums[weight][...] = jnp.zeros_like(self.sums[weight])
            if weight in t.early:
                jax.lax.fori_loop(0, t.counts[weight], partial(self.use_early, weight), None)
            if weight in t.late:
                jax.lax.fori_loop(t.counts[weight], t.steps, partial(self.use_late, weight), None)
        for copy in self.of_factors():
            copy.wait()
        for weight, out in enumerate(self.outs):
            y = self.sums[weight][...]
            out[...] = (y * self.factors[weight][...] if self.factors else y).astype(out.dtype)

    def of_factors(self) -> list:
        pairs = zip(self.scales, self.factors, strict=True)
        return [pltpu.make_async_copy(a.at[self.layer], b, self.factors_arrived) for a, b in pairs]

    def use_early(self, weight: int, tile, carry) -> None:
        at = self.tiles.early.index(weight)
        if self.flags:
            _early(self.tiles, self.buffers[at], self.flags[at], tile).wait()
        self.add(weight, tile, self.buffers[at][self.tiles.rows(tile), :])

    def use_late(self, weight: int, tile, carry) -> None:
        t = self.tiles
        at = t.late.index(weight)
        self.copy(at, tile).wait()
        self.add(weight, tile, self.rings[at][self.slot(at, tile)])
        following = tile + t.ring
        pl.when(following < t.steps)(lambda: self.copy(at, following).start())
        if at + 1 < len(t.late):
            first = t.counts[t.late[at + 1]]
            pl.when(following >= t.steps)(lambda: self.copy(at + 1, first + following - t.steps).start())

    def slot(self, at: int, tile):
        return jax.lax.rem(jnp.int32(tile - self.tiles.counts[self.tiles.late[at]]), jnp.int32(self.tiles.ring))

    def copy(self, at: int, tile):
        """Of a tile of the at-th of the late weights, into its place in the ring."""
        slot = self.slot(at, tile)
        source = self.weights[self.tiles.late[at]].at[self.layer, self.tiles.rows(tile), :]
        return pltpu.make_async_copy(source, self.rings[at].at[slot], self.arrived.at[at, slot])

    def add(self, weight: int, tile, w) -> None:
        compute = self.tiles.problem.compute
        exact = jax.lax.Precision.HIGHEST if compute == "float32" else None
        x = self.x[:, self.tiles.rows(tile)].astype(compute)
        self.sums[weight][...] += jnp.dot(x, w.astype(compute), precision=exact, preferred_element_type=jnp.float32)
