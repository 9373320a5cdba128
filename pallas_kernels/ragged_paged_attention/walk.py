"""Which rows, pages and blocks the kernel visits, and the copies that run ahead of it. All of it is scalar work.

A piece is the part of a row that lies in a window of query tokens. Its blocks are consecutive pages, from the first
that any of its queries may see to the last one.
"""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Places in `ahead`, the scalars that live from one window to the next.
ROW, WINDOW, BLOCK, STARTED, TAKEN, VISITED = range(6)


class Piece(NamedTuple):
    """Tokens first..last-1 of the pass; the position of token g is g + offset. Keys low..high-1 may be seen."""

    row: jax.Array
    first: jax.Array
    last: jax.Array
    offset: jax.Array
    low: jax.Array
    high: jax.Array
    page: jax.Array  # the first page to read, as an index of the row's pages
    pages: jax.Array  # how many
    blocks: jax.Array


@dataclass(frozen=True)
class Walk:
    """The scalar side of the kernel. Fields are references in the kernel's memories, and static facts."""

    starts: Any
    lengths: Any
    table: Any
    pages: Any
    page_scales: Any
    buffer: Any
    scale_buffer: Any
    arrived: Any
    ahead: Any
    window: int
    left: int | None
    run: int

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def per_row(self) -> int:
        return self.table.shape[0] // self.rows

    @property
    def per_block(self) -> int:
        return self.buffer.shape[1]

    @property
    def page(self) -> int:
        return self.buffer.shape[3]

    def piece(self, row: jax.Array, window: jax.Array) -> Piece:
        """What there is of a row in a window; nothing where they do not meet."""
        start, end = self.starts[row], self.starts[row + 1]
        first = jnp.maximum(start, window * self.window)
        last = jnp.minimum(end, (window + 1) * self.window)
        offset = self.lengths[row] - end
        high = jnp.where(last > first, jnp.minimum(offset + last, self.per_row * self.page), 0)
        low = 0 * high if self.left is None else jnp.maximum(offset + first - self.left, 0)
        page = low // self.page
        pages = jnp.maximum(lax.div(high + (self.page - 1), self.page) - page, 0)
        return Piece(row, first, last, offset, low, high, page, pages, pl.cdiv(pages, self.per_block))

    def window_of(self, window: jax.Array, attend: Any) -> None:
        """Visits the rows that have tokens in a window."""
        ahead, buffers = self.ahead, self.buffer.shape[0]

        @pl.when(window == 0)
        def _():
            for place in (ROW, WINDOW, STARTED, TAKEN, VISITED):
                ahead[place] = 0
            ahead[BLOCK] = -1
            for _ in range(buffers - 1):
                self.start_next()

        attend.clear()

        def more(state):
            return state[1]

        def visit(state):
            row, _ = state
            piece = self.piece(row, window)

            @pl.when(piece.last > piece.first)
            def _():
                self.visit(piece, window, attend)

            ended = self.starts[row + 1] <= (window + 1) * self.window
            row = jnp.where(ended, row + 1, row)
            return row, ended & self.begins(row, window)

        row = ahead[VISITED]
        row, _ = lax.while_loop(more, visit, (row, self.begins(row, window)))
        ahead[VISITED] = row

    def begins(self, row: jax.Array, window: jax.Array) -> jax.Array:
        """Whether there is such a row and it begins before the window's end."""
        return (row < self.rows) & (self.starts[jnp.minimum(row, self.rows)] < (window + 1) * self.window)

    def visit(self, piece: Piece, window: jax.Array, attend: Any) -> None:
        one = piece.last - piece.first == 1
        begin = window * self.window
        attend.begin(piece, begin, one)

        def step(block, _):
            self.start_next()
            slot = lax.rem(self.ahead[TAKEN], self.buffer.shape[0])
            self.ahead[TAKEN] += 1
            pages = jnp.minimum(piece.pages - block * self.per_block, self.per_block)
            self.wait(slot, pages)
            key = (piece.page + block * self.per_block) * self.page
            attend.block(piece, begin, one, key, self.buffer.at[slot], self.scales_at(slot))
            return 0

        lax.fori_loop(0, piece.blocks, step, 0)
        attend.end(piece, begin, one)

    def scales_at(self, slot: jax.Array) -> Any:
        return None if self.scale_buffer is None else self.scale_buffer.at[slot]

    def start_next(self) -> None:
        """Starts copying the next block that the walk will come to, if there is one."""
        ahead = self.ahead
        window, block = ahead[WINDOW], ahead[BLOCK] + 1

        def lost(state):
            row, window, block = state
            return (row < self.rows) & (block >= self.piece(jnp.minimum(row, self.rows - 1), window).blocks)

        def onward(state):
            row, window, _ = state
            end = self.starts[row + 1]
            here = end > (window + 1) * self.window
            next_window = jnp.maximum(window, end // self.window)
            return jnp.where(here, row, row + 1), jnp.where(here, window + 1, next_window), jnp.int32(0)

        row, window, block = lax.while_loop(lost, onward, (ahead[ROW], window, block))
        ahead[ROW], ahead[WINDOW], ahead[BLOCK] = row, window, block

        @pl.when(row < self.rows)
        def _():
            slot = lax.rem(ahead[STARTED], self.buffer.shape[0])
            ahead[STARTED] += 1
            piece = self.piece(row, window)
            pages = jnp.minimum(piece.pages - block * self.per_block, self.per_block)
            self.start(row * self.per_row + piece.page + block * self.per_block, pages, slot)

    def start(self, entry: jax.Array, pages: jax.Array, slot: jax.Array) -> None:
        """Starts the copies of `pages` entries of the table: one where they follow each other, else one for each
        aligned run that does, trying runs that halve until none is left."""
        first = self.page_id(entry)
        maybe = self.page_id(entry + pages - 1) - first == pages - 1

        def count_broken(k, broken):
            return broken + (self.page_id(entry + k) != first + k).astype(jnp.int32)

        whole = maybe & (lax.fori_loop(0, jnp.where(maybe, pages, 0), count_broken, 0) == 0)
        pl.when(whole)(lambda: self.copy(first, slot, 0, pages))

        @pl.when(jnp.logical_not(whole))
        def _():
            done, run = 0 * pages, self.run
            while run:
                groups = lax.div(pages - done, run)
                lax.fori_loop(0, groups, partial(self.start_run, entry + done, slot, done, run), 0)
                done += groups * run
                run //= 2

    def start_run(
        self, entry: jax.Array, slot: jax.Array, index: jax.Array, run: int, group: jax.Array, _: int
    ) -> int:
        """Copies `run` entries: at once where their pages follow each other, else one by one."""
        found = [self.page_id(entry + group * run + k) for k in range(run)]
        index = index + group * run
        together = functools.reduce(jnp.logical_and, (page == found[0] + k for k, page in enumerate(found)))

        @pl.when(together)
        def _():
            self.copy(found[0], slot, index, run)

        @pl.when(jnp.logical_not(together))
        def _():
            for k, page in enumerate(found):
                self.copy(page, slot, index + k, 1)

        return 0

    def page_id(self, entry: jax.Array) -> jax.Array:
        """An id that can be read whatever the table holds (a negative one is a large unsigned one)."""
        last = jnp.uint32(self.pages.shape[0] - 1)
        return jnp.minimum(self.table[entry].astype(jnp.uint32), last).astype(jnp.int32)

    def copy(self, page: jax.Array, slot: jax.Array, index: Any, count: Any) -> None:
        semaphore = self.arrived.at[slot]
        for source, target in ((self.pages, self.buffer), (self.page_scales, self.scale_buffer)):
            if source is not None:
                source, target = source.at[pl.ds(page, count)], target.at[slot, pl.ds(index, count)]
                pltpu.make_async_copy(source, target, semaphore).start()

    def wait(self, slot: jax.Array, pages: jax.Array) -> None:
        """Until the pages of a block have arrived: one wait for all of a full block."""

        def wait_for(*place):
            for target in (self.buffer, self.scale_buffer):
                if target is not None:
                    pltpu.make_async_copy(target.at[place], target.at[place], self.arrived.at[slot]).wait()

        @pl.when(pages == self.per_block)
        def _():
            wait_for(slot)

        @pl.when(pages < self.per_block)
        def _():
            def one(index, _):
                wait_for(slot, index)
                return 0

            lax.fori_loop(0, pages, one, 0)
