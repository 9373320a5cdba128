"""`paged_append` on a TPU: pages are read, merged and written back a few slots at a time, in place.

Memory is tiled: 8 slots of float32, 16 of bfloat16 and 32 of bytes can be written alone. A unit is so many slots of
a page, of all its heads. A unit that new tokens fill is only written; others are read first. Units are independent,
so a few of them are on their way at a time. Scales are a row a page: they are read, merged and written in turn.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_append.reference import New
from pallas_kernels.ragged_paged_attention.kernel import CACHES, TABLE_BYTES
from pallas_kernels.ragged_paged_attention.pages import LANES
from pallas_kernels.stacks import from_hbm, in_hbm

DEPTH, LEAD = 8, 4  # units that are held, and that are read ahead; the others are being written
ROW, UNIT, SLOTS = 0, 1, 8  # places in `ahead`; from SLOTS on, row and unit of each buffer


def unsupported(pages: jax.Array, page_table: jax.Array) -> list[str]:
    """Why the kernel cannot do a call; empty where it can."""
    reasons = []
    if not any(pages.dtype == d for d in CACHES):
        reasons.append(f"the pages are {pages.dtype.name}")
    elif pages.shape[-2] % unit_of(pages.dtype, pages.shape[-2]) or pages.shape[-2] % 8:
        reasons.append(f"a page has {pages.shape[-2]} tokens, not a multiple of {unit_of(pages.dtype, 1 << 30)}")
    if pages.shape[-1] % LANES:
        reasons.append(f"the pages' rows are {pages.shape[-1]} wide, not a multiple of {LANES} (see page_width)")
    if page_table.size * 4 > TABLE_BYTES:
        reasons.append(f"page_table has {page_table.size} entries, more than {TABLE_BYTES // 4}")
    return reasons


def unit_of(dtype: Any, page: int) -> int:
    """Slots of a unit: a whole tile of the memory."""
    return min(32 // jnp.dtype(dtype).itemsize, page)


def pallas(arrays: New, *, interpret: bool) -> tuple[jax.Array, jax.Array | None]:
    """The same arguments and results as the reference."""
    pages, page_scales, rows = arrays.pages, arrays.page_scales, arrays.rows
    groups, page, width = pages.shape[-3:]
    unit = unit_of(pages.dtype, page)
    scaled = page_scales is not None
    inputs = [rows, in_hbm(pages, interpret, aliased=True)]
    scratch: dict[str, Any] = dict(
        ahead=pltpu.SMEM((SLOTS + 2 * DEPTH,), jnp.int32),
        rows=dict(
            held=pltpu.VMEM((DEPTH, groups, unit, width), pages.dtype),
            own=pltpu.VMEM((DEPTH, unit, groups, width), pages.dtype),
            wide=pltpu.VMEM((unit, groups, width), jnp.float32),
            read=pltpu.SemaphoreType.DMA((DEPTH,)),
            written=pltpu.SemaphoreType.DMA((DEPTH,)),
        ),
    )
    if page_scales is not None:
        assert arrays.scales is not None
        lanes = page_scales.shape[-1]
        # A token's scales in every slot of their head, so that the token's own slot takes them without a shuffle.
        spread = jnp.repeat(arrays.scales.reshape(rows.shape[0], 1, -1), page, axis=-1)
        inputs += [in_hbm(page_scales, interpret, aliased=True), spread]
        scratch["scales"] = dict(
            held=pltpu.VMEM((DEPTH, 1, 1, lanes), jnp.float32),
            own=pltpu.VMEM((DEPTH, page, 1, lanes), jnp.float32),
            read=pltpu.SemaphoreType.DMA((DEPTH,)),
            written=pltpu.SemaphoreType.DMA((DEPTH,)),
        )

    def body(starts, lengths, table, layer, rows, _, *refs):
        refs = list(refs)
        spread = refs[1] if scaled else None
        out_pages, *out_scales = refs[2 * scaled : -1]
        own = refs[-1]
        queue = Queue(starts, lengths, table, own["ahead"], pages.shape[1], page, unit)
        queue.run(Rows(out_pages.at[layer[0]], rows, **own["rows"]))
        if scaled:
            replace(queue, unit=page).run(Scales(out_scales[0].at[layer[0]], spread, **own["scales"]))

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    outs = [jax.ShapeDtypeStruct(pages.shape, pages.dtype)]
    aliases = {5: 0}
    if page_scales is not None:
        outs.append(jax.ShapeDtypeStruct(page_scales.shape, page_scales.dtype))
        aliases[6] = 1
    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[in_place] * len(inputs),
            out_specs=[in_place] * len(outs),
            scratch_shapes=[scratch],
        ),
        out_shape=outs,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, has_side_effects=True),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="paged_append",
    )(
        arrays.q_starts,
        arrays.kv_lengths,
        arrays.page_table.reshape(-1),
        jnp.clip(arrays.layer, 0, pages.shape[0] - 1).reshape(1),
        *inputs,
    )
    results = from_hbm(results)
    return results[0], results[1] if scaled else None


class Unit(NamedTuple):
    """Slots low..high-1 of the unit that begins at slot `slot` of a page take the tokens from `token` on."""

    slot: jax.Array
    low: jax.Array
    high: jax.Array
    token: jax.Array
    page: jax.Array
    fine: jax.Array  # whether there is anything to write


@dataclass(frozen=True)
class Queue:
    """The units of a pass in order, a few on their way: read by `store.reads`, merged by `store.merge`, written by
    `store.write`. Fields are references in the kernel's memories, and static facts."""

    starts: Any
    lengths: Any
    table: Any
    ahead: Any
    pages: int  # how many there are
    page: int  # slots of one
    unit: int  # slots of a unit

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def slots(self) -> int:
        return self.table.shape[0] // self.rows * self.page

    def span(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first unit that a row writes to, and how many it does."""
        new = self.starts[row + 1] - self.starts[row]
        first = jnp.maximum(self.lengths[row] - new, 0)
        last = jnp.minimum(self.lengths[row], self.slots)
        unit = lax.div(first, self.unit)
        return unit, jnp.where(last > first, lax.div(last + (self.unit - 1), self.unit) - unit, 0)

    def at(self, row: jax.Array, unit: jax.Array) -> Unit:
        start = unit * self.unit
        new = self.starts[row + 1] - self.starts[row]
        begin = self.lengths[row] - new  # the position of the row's first new token
        low = jnp.maximum(jnp.maximum(begin, 0) - start, 0)
        high = jnp.minimum(jnp.minimum(self.lengths[row], self.slots) - start, self.unit)
        page = self.table[row * (self.slots // self.page) + lax.div(start, self.page)]
        fine = (page >= 0) & (page < self.pages)
        slot = pl.multiple_of(lax.rem(start, self.page), self.unit)
        return Unit(slot, low, high, self.starts[row] + start + low - begin, jnp.where(fine, page, 0), fine)

    def run(self, store: Any) -> None:
        ahead = self.ahead
        total = lax.fori_loop(0, self.rows, lambda row, found: found + self.span(row)[1], 0)
        ahead[ROW], ahead[UNIT] = 0, -1

        def begin(index, _):
            self.begin(index, store)
            return 0

        def step(index, _):
            pl.when(index + LEAD < total)(lambda: self.begin(index + LEAD, store))
            slot, unit = self.held(index)

            @pl.when(unit.fine)
            def _():
                store.reads(slot, unit, lambda copy: copy.wait())
                store.merge(slot, unit)
                store.write(slot, unit).start()

            return 0

        def drain(index, _):
            self.settle(index, store)
            return 0

        lax.fori_loop(0, jnp.minimum(total, LEAD), begin, 0)
        lax.fori_loop(0, total, step, 0)
        lax.fori_loop(jnp.maximum(total - DEPTH, 0), total, drain, 0)

    def held(self, index: jax.Array) -> tuple[jax.Array, Unit]:
        """The buffer of the unit number `index`, and the unit that it holds."""
        slot = lax.rem(index, DEPTH)
        place = SLOTS + 2 * slot
        return slot, self.at(self.ahead[place], self.ahead[place + 1])

    def begin(self, index: jax.Array, store: Any) -> None:
        """Starts reading the next unit, as number `index`."""
        ahead = self.ahead

        def lost(state):
            return state[1] >= self.span(state[0])[1]

        row, nth = lax.while_loop(lost, lambda state: (state[0] + 1, jnp.int32(0)), (ahead[ROW], ahead[UNIT] + 1))
        ahead[ROW], ahead[UNIT] = row, nth
        pl.when(index >= DEPTH)(lambda: self.settle(index - DEPTH, store))
        place = SLOTS + 2 * lax.rem(index, DEPTH)
        ahead[place], ahead[place + 1] = row, self.span(row)[0] + nth
        slot, unit = self.held(index)
        pl.when(unit.fine)(lambda: store.reads(slot, unit, lambda copy: copy.start()))

    def settle(self, index: jax.Array, store: Any) -> None:
        """Waits until the unit number `index` is written."""
        slot, unit = self.held(index)
        pl.when(unit.fine)(lambda: store.write(slot, unit).wait())


@dataclass(frozen=True)
class Rows:
    """Keys and values: units of slots that lie in whole tiles."""

    pages: Any  # [P, K, page, W]
    new: Any  # [tokens, K, W]
    held: Any  # [buffers, K, unit, W]
    own: Any  # [buffers, unit, K, W]
    wide: Any  # float32 [unit, K, W], to turn (token, head) into (head, token)
    read: Any
    written: Any

    @property
    def unit(self) -> int:
        return self.held.shape[2]

    def place(self, unit: Unit) -> Any:
        return self.pages.at[unit.page, :, pl.ds(unit.slot, self.unit), :]

    def reads(self, slot: jax.Array, unit: Unit, do: Any) -> None:
        """The copies that bring a unit: new tokens, and what its other slots hold."""
        full = unit.high - unit.low == self.unit

        @pl.when(full)
        def _():
            source = self.new.at[pl.ds(unit.token, self.unit)]
            do(pltpu.make_async_copy(source, self.own.at[slot], self.read.at[slot]))

        @pl.when(jnp.logical_not(full))
        def _():
            do(pltpu.make_async_copy(self.place(unit), self.held.at[slot], self.read.at[slot]))
            _each(
                unit,
                lambda at, g: do(pltpu.make_async_copy(self.new.at[g], self.own.at[slot, at], self.read.at[slot])),
            )

    def merge(self, slot: jax.Array, unit: Unit) -> None:
        self.wide[...] = self.own[slot].astype(jnp.float32)
        at = lax.broadcasted_iota(jnp.int32, (self.unit, self.wide.shape[-1]), 0)
        mine = (at >= unit.low) & (at < unit.high)
        for head in range(self.wide.shape[1]):
            old = self.held[slot, head].astype(jnp.float32)
            self.held[slot, head] = jnp.where(mine, self.wide[:, head, :], old).astype(self.held.dtype)

    def write(self, slot: jax.Array, unit: Unit) -> Any:
        return pltpu.make_async_copy(self.held.at[slot], self.place(unit), self.written.at[slot])


@dataclass(frozen=True)
class Scales:
    """The scales: a unit is a page."""

    scales: Any  # [P, 1, 2 * K * page]
    new: Any  # [tokens, 1, 2 * K * page]
    held: Any  # [buffers, 1, 1, 2 * K * page]
    own: Any  # [buffers, page, 1, 2 * K * page]
    read: Any
    written: Any

    def reads(self, slot: jax.Array, unit: Unit, do: Any) -> None:
        do(pltpu.make_async_copy(self.scales.at[pl.ds(unit.page, 1)], self.held.at[slot], self.read.at[slot]))
        _each(
            unit, lambda at, g: do(pltpu.make_async_copy(self.new.at[g], self.own.at[slot, at], self.read.at[slot]))
        )

    def merge(self, slot: jax.Array, unit: Unit) -> None:
        shape = self.held.shape[2:]
        slots = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 1), self.own.shape[1])
        _each(
            unit,
            lambda at, _: self.held.__setitem__(
                (slot, 0), jnp.where(slots == at, self.own[slot, at], self.held[slot, 0])
            ),
        )

    def write(self, slot: jax.Array, unit: Unit) -> Any:
        there = self.scales.at[pl.ds(unit.page, 1)]
        return pltpu.make_async_copy(self.held.at[slot], there, self.written.at[slot])


def _each(unit: Unit, do: Any) -> None:
    """do(slot of the unit, token) for every new token of it."""

    def one(at, _):
        do(at, unit.token + at - unit.low)
        return 0

    lax.fori_loop(unit.low, unit.high, one, 0)
