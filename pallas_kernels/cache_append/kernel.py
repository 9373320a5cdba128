"""`cache_append` for TPUs: the tiles that new tokens fall into are read, merged and written back, in place.

A token is one row, or one column, of a tile in HBM, and only whole tiles can be copied. Tiles of several rows of
the batch are on their way at once. With scales both arrays are written by one call.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.cache_append import blocks as block_sizes
from pallas_kernels.cache_append.blocks import LANES, Blocks, Problem
from pallas_kernels.stacks import from_hbm, in_hbm
from pallas_kernels.stored import BFLOAT16_BITS, encode


@partial(jax.jit, static_argnames=("ring", "blocks", "interpret"))
def pallas(
    cache: jax.Array,
    new: jax.Array,
    layer: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    scales: jax.Array | None,
    new_scales: jax.Array | None,
    *,
    ring: bool,
    blocks: Blocks | None,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The arguments of the reference; with scales [L, B, K, S] those of the tokens, `new_scales [B, K, T]`, too.

    Returns (cache,) or (cache, scales).
    """
    layers, batch, groups, slots, dim = cache.shape
    problem = Problem(batch, groups, slots, dim, new.shape[2], cache.dtype.name, scales is not None, ring)
    chip = chips.current()
    sizes = tuned.choose("cache_append", block_sizes, problem, chip, blocks)
    parts = [Part(problem, sizes, False)] + ([Part(problem, sizes, True)] if scales is not None else [])
    pairs = [(cache, encode(new, cache.dtype)), (scales, new_scales)][: len(parts)]
    targets = [
        in_hbm(part.view(x, interpret), interpret, aliased=True) for part, (x, _) in zip(parts, pairs, strict=True)
    ]
    sources = [part.source(x) for part, (_, x) in zip(parts, pairs, strict=True)]
    cores = 2 if chip.megacore and batch % (2 * sizes.rows) == 0 else 1
    any_space = pl.BlockSpec(memory_space=pl.ANY)
    written = pl.pallas_call(
        partial(_body, parts=parts, cores=cores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores,),
            in_specs=[any_space] * (2 * len(parts)),
            out_specs=[any_space] * len(parts),
            scratch_shapes=[
                *[pltpu.VMEM((sizes.depth, sizes.rows, *part.window_shape), part.dtype) for part in parts],
                *[pltpu.VMEM((sizes.depth, sizes.rows, *part.source_shape), part.dtype) for part in parts],
                pltpu.SMEM((3 + 2 * sizes.depth,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, sizes.depth)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in targets],
        input_output_aliases={3 + n: n for n in range(len(parts))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            # No more than it needs: what is fetched for a later product keeps its place.
            vmem_limit_bytes=min(tuned.budget(chip), block_sizes.vmem_bytes(problem, sizes) * 3 // 2 + (8 << 20)),
            disable_bounds_checks=True,
        ),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan") if interpret else False,
        name="cache_append",
    )(jnp.clip(layer, 0, layers - 1).reshape(1), starts, counts, *targets, *sources)
    return tuple(part.unview(x, slots) for part, x in zip(parts, from_hbm(written), strict=True))


@dataclass(frozen=True)
class Part:
    """One array that is written: the cache, or its scales."""

    problem: Problem
    sizes: Blocks
    scales: bool

    @property
    def lanes(self) -> bool:
        """Whether slots lie along the lanes."""
        return self.scales or self.problem.lanes

    @property
    def dtype(self):
        return jnp.dtype(jnp.float32 if self.scales else self.problem.cache)

    @property
    def size(self) -> int:
        """Slots of a window."""
        return self.problem.window(self.scales, self.sizes)

    @property
    def tokens(self) -> int:
        """Tokens of a row, filled up to whole windows."""
        return -(-self.problem.tokens // self.size) * self.size

    @property
    def dims(self) -> tuple[int, ...]:
        return () if self.scales else (self.problem.dim,)

    @property
    def window_shape(self) -> tuple[int, ...]:
        shape = (self.size,)
        return (self.problem.kv_heads, *((*self.dims, *shape) if self.lanes else (*shape, *self.dims)))

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of the tokens that may fall into one window: a single one, or one or two windows of them."""
        groups = self.problem.kv_heads
        if self.problem.tokens == 1:
            return (groups, *(self.dims or (LANES,)))
        size = min(2 * self.size, self.tokens)
        return (groups, *((*self.dims, size) if self.lanes else (size, *self.dims)))

    def view(self, x: jax.Array | None, interpret: bool) -> jax.Array:
        """The array with its slots where XLA lays them out: this moves nothing."""
        assert x is not None
        if interpret:  # It has no tiles: what a copy of whole tiles reads past the last slot must exist.
            pad = [(0, 0)] * x.ndim
            pad[3] = (0, -x.shape[3] % self.problem.tile(self.scales))
            x = jnp.pad(x, pad)
        return jnp.swapaxes(x, -1, -2) if self.lanes and x.ndim == 5 else x

    def unview(self, x: jax.Array, slots: int) -> jax.Array:
        x = jnp.swapaxes(x, -1, -2) if self.lanes and x.ndim == 5 else x
        return x if x.shape[3] == slots else x[:, :, :, :slots]

    def source(self, new: jax.Array | None) -> jax.Array:
        """New tokens [B, K, T, D] or scales [B, K, T] as the kernel reads them: a row is `source_shape` or more."""
        assert new is not None
        if self.problem.tokens == 1:
            return jnp.broadcast_to(new, (*new.shape[:2], LANES)) if self.scales else new[:, :, 0]
        pad = [(0, 0)] * new.ndim
        pad[2] = (0, self.tokens - new.shape[2])
        new = jnp.pad(new, pad)
        return jnp.swapaxes(new, -1, -2) if self.lanes and new.ndim == 4 else new

    def window(self, ref: Any, where: tuple, start) -> Any:
        """Slots start.. of a reference to [.., K, S, D], [.., K, D, S] or [.., K, S]."""
        slots = pl.ds(start, self.size)
        lead = (slice(None),) * (2 if self.lanes and not self.scales else 1)
        return ref.at[(*where, *lead, slots)]


def _body(layer, starts, counts, *refs, parts: list[Part], cores: int):
    count = len(parts)
    sources, targets = refs[count : 2 * count], refs[2 * count : 3 * count]
    windows, tokens = refs[3 * count : 4 * count], refs[4 * count : 5 * count]
    state, semaphores = refs[-2:]
    problem = parts[0].problem
    for n, part in enumerate(parts):
        # The second time around the ring comes after the first: both may write to one tile.
        for shift in (0, problem.slots) if problem.ring and problem.tokens > 1 else (0,):
            _Pass(
                part,
                shift,
                problem.batch // part.sizes.rows // cores,
                pl.program_id(0),
                layer[0],
                starts,
                counts,
                targets[n],
                sources[n],
                windows[n],
                tokens[n],
                state,
                semaphores,
            ).run()


@dataclass(frozen=True)
class _Pass:
    """Writing one array, all rows of a core.

    `state`: the group of rows and the window to fetch next; how many are done; group and window of each buffer.
    """

    part: Part
    shift: int
    groups: int  # of rows, of this core
    core: Any
    layer: Any
    starts: Any
    counts: Any
    target: Any
    source: Any
    window: Any
    tokens: Any
    state: Any
    semaphores: Any

    def place(self, row) -> tuple:
        """Token t of a row goes to slot origin + t; slots low..high-1 are written."""
        problem = self.part.problem
        slots, start, count = jnp.int32(problem.slots), self.starts[row], self.counts[row]
        first = jnp.int32(0)
        if problem.ring:
            first = jnp.maximum(count - slots, 0)
            start = jax.lax.rem(start + first, slots)
            start = jnp.where(start < 0, start + slots, start) - first - self.shift
        return start, jnp.clip(start + first, 0, slots), jnp.clip(start + count, 0, slots)

    def span(self, row) -> tuple:
        """First window of a row, and how many."""
        _, low, high = self.place(row)
        shift = self.part.size.bit_length() - 1
        first = low >> shift
        return first, jnp.where(high > low, ((high - 1) >> shift) - first + 1, 0)

    def rows(self, group) -> list:
        first = (self.core * self.groups + group) * self.part.sizes.rows
        return [first + r for r in range(self.part.sizes.rows)]

    def most(self, group):
        """Windows of the row of a group that has most."""
        most = jnp.int32(0)
        for row in self.rows(group):
            most = jnp.maximum(most, self.span(row)[1])
        return most

    def each(self, group, j, act) -> None:
        """act(r, row, first slot of its j-th window) for the rows that have one."""
        for r, row in enumerate(self.rows(group)):
            first, many = self.span(row)
            pl.when(j < many)(partial(act, r, row, (first + j) * self.part.size))

    def reads(self, slot, act) -> Any:
        """What brings a window and its tokens; `act` starts a copy or waits for it."""
        part, semaphore = self.part, self.semaphores.at[0, slot]

        def copy(source, target):
            act(pltpu.make_async_copy(source, target, semaphore))

        def row_copies(r, row, start):
            start = pl.multiple_of(start, part.size)
            origin, low, high = self.place(row)
            kept = (start < low) | (start + part.size > high)
            window = self.window.at[slot, r]

            @pl.when(kept)
            def _():
                copy(part.window(self.target, (self.layer, row), start), window)

            if part.tokens <= part.size or part.problem.tokens == 1:
                copy(self.source.at[row], self.tokens.at[slot, r])
                return
            first = self.first_token(start, origin)
            for half in range(2):
                at = pl.multiple_of(first + half * part.size, part.size)
                here = self.tokens.at[slot, r]

                @pl.when((at >= 0) & (at < part.tokens))
                def _(at=at, half=half, here=here):
                    copy(part.window(self.source, (row,), at), part.window(here, (), half * part.size))

        return row_copies

    def first_token(self, start, origin):
        """The window of tokens in which the one for a slot lies."""
        return (start - origin) & -self.part.size

    def write(self, slot, act) -> Any:
        def row_copy(r, row, start):
            start = pl.multiple_of(start, self.part.size)
            target = self.part.window(self.target, (self.layer, row), start)
            act(pltpu.make_async_copy(self.window.at[slot, r], target, self.semaphores.at[1, slot]))

        return row_copy

    def fetch(self, slot) -> None:
        """Begins to read the next windows that there are, of whichever rows."""
        last = self.groups - 1

        def used_up(place):
            return (place[0] <= last) & (place[1] >= self.most(jnp.minimum(place[0], last)))

        group, j = jax.lax.while_loop(
            used_up, lambda place: (place[0] + 1, jnp.int32(0)), (self.state[0], self.state[1])
        )
        self.state[0] = group
        self.state[1] = j + 1
        pl.when(group <= last)(lambda: self.each(group, j, self.reads(slot, lambda copy: copy.start())))

    def merge(self, slot, r, row, start) -> None:
        """New tokens over what the window holds."""
        part = self.part
        origin, low, high = self.place(row)
        axis = 1 if part.lanes else 0
        single = self.single(slot, r) if part.problem.tokens == 1 else None
        heads: list[Any] = [slice(None)] if part.scales else list(range(part.problem.kv_heads))
        for n, k in enumerate(heads):
            old = _wide(self.window[slot, r, k])
            at = start + jax.lax.broadcasted_iota(jnp.int32, old.shape, axis)
            new = self.several(slot, r, k, start, origin, at) if single is None else single[n]
            merged = jnp.where((at >= low) & (at < high), new, old)
            self.window[slot, r, k] = _narrow(merged, part.dtype)

    def single(self, slot, r) -> list[jax.Array]:
        """For each head a row's one token, to be spread over the slots of a window."""
        tokens, groups = self.tokens[slot, r], self.part.problem.kv_heads
        if self.part.scales:
            return [tokens]
        tokens = _wide(tokens)
        if not self.part.lanes:
            return [tokens[k : k + 1] for k in range(groups)]
        turned = jnp.pad(tokens, ((0, -groups % 8), (0, 0))).T
        return [turned[:, k : k + 1] for k in range(groups)]

    def several(self, slot, r, k, start, origin, at) -> jax.Array:
        """A row's tokens, each turned to where its slot is in the window."""
        part, axis = self.part, 1 if self.part.lanes else 0
        new = _wide(self.tokens[slot, r, k])
        turn = (origin - start) & (part.size - 1)
        first = pltpu.roll(jax.lax.slice_in_dim(new, 0, part.size, axis=axis), turn, axis)
        if part.tokens == part.size:
            return first
        second = pltpu.roll(jax.lax.slice_in_dim(new, part.size, 2 * part.size, axis=axis), turn, axis)
        return jnp.where(at < origin + self.first_token(start, origin) + part.size, first, second)

    def run(self) -> None:
        depth = self.part.sizes.depth
        ahead = depth // 2
        for n in range(3):
            self.state[n] = jnp.int32(0)
        for n in range(ahead):
            self.fetch(n)

        def step(j, group):
            used = self.state[2]
            slot = jax.lax.rem(used, jnp.int32(depth))
            self.state[2] = used + 1
            self.state[3 + 2 * slot] = group
            self.state[4 + 2 * slot] = j
            pl.when(used >= ahead)(lambda: self.written(used - ahead))  # it has the buffer that is fetched to
            self.fetch(jax.lax.rem(used + ahead, jnp.int32(depth)))
            self.each(group, j, self.reads(slot, lambda copy: copy.wait()))
            self.each(group, j, partial(self.merge, slot))
            self.each(group, j, self.write(slot, lambda copy: copy.start()))
            return group

        jax.lax.fori_loop(
            0, self.groups, lambda g, c: (jax.lax.fori_loop(0, self.most(g), step, g), c)[1], jnp.int32(0)
        )
        used = self.state[2]
        jax.lax.fori_loop(jnp.maximum(used - ahead, 0), used, lambda n, c: (self.written(n), c)[1], jnp.int32(0))

    def written(self, n) -> None:
        """Waits until the n-th windows are written."""
        slot = jax.lax.rem(n, jnp.int32(self.part.sizes.depth))
        group, j = self.state[3 + 2 * slot], self.state[4 + 2 * slot]
        self.each(group, j, self.write(slot, lambda copy: copy.wait()))


def _wide(x: jax.Array) -> jax.Array:
    """Stored values in 32 bits, which every vector operation knows."""
    if x.dtype == BFLOAT16_BITS:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    if x.dtype.itemsize == 1 and x.dtype != jnp.int8:
        x = jax.lax.bitcast_convert_type(x, jnp.int8)
    return x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)


def _narrow(x: jax.Array, dtype) -> jax.Array:
    if dtype == BFLOAT16_BITS:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
    if dtype.itemsize == 1 and dtype != jnp.int8:
        return jax.lax.bitcast_convert_type(x.astype(jnp.int8), dtype)
    return x.astype(dtype)
