"""What the kernel reads when: each row's live slots in chunks, copied ahead of the arithmetic across rows.

A work item is a group of rows, or one of several splits of their live slots; a core handles its items in order.
Chunks of one item after another pass through a ring of `depth` buffers in VMEM: while one is attended to, the next
`depth - 1` are on their way, those of later items too. Rows and items without live slots cost nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def divided(a, b: int) -> jax.Array:
    """a / b of an integer a of 0 or more, up. (`//` would also care about negative ones, in scalar code.)"""
    return jax.lax.div(a + (b - 1), jnp.int32(b))


def aligned(a, to: int) -> jax.Array:
    """a down to a multiple of a power of two."""
    return a & -to


@dataclass(frozen=True)
class Spans:
    """Which slots an item reads. All static but the row lengths."""

    tokens: int
    slots: int
    kv: int  # slots of a chunk
    align: int  # where copies may begin and end
    rows: int  # rows of an item
    splits: int
    row_groups: int
    items: int  # of one core
    left: int | None
    ring: bool
    lengths: Callable  # row -> its length

    def item(self, core, i) -> tuple[jax.Array, jax.Array]:
        """First row and split of a core's item i."""
        index = core * self.items + i
        if self.splits == 1:
            return index * self.rows, jnp.int32(0)
        groups = jnp.int32(self.row_groups)
        return jax.lax.rem(index, groups) * self.rows, jax.lax.div(index, groups)

    def live(self, row, split) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Slots low..high-1 of a row that a split attends to, and the aligned slot where its copies begin."""
        length = self.lengths(row)
        high = jnp.clip(length, 0, self.slots)
        low = jnp.zeros_like(high)
        if self.left is not None and not self.ring:
            low = jnp.clip(length - self.tokens - self.left, 0, high)
        start = aligned(low, self.align)
        if self.splits > 1:
            part = aligned(divided(high - start, self.splits) + (self.align - 1), self.align)
            start = start + split * part
            low, high = jnp.maximum(low, start), jnp.minimum(high, start + part)
        return low, high, start

    def chunks(self, first_row, split) -> jax.Array:
        """Chunks of an item: as many as its longest row has."""
        most = jnp.int32(0)
        for u in range(self.rows):
            _, high, start = self.live(first_row + u, split)
            most = jnp.maximum(most, high - start)
        return divided(most, self.kv)


@dataclass(frozen=True)
class Source:
    """One array of the cache: `hbm [L, B, K, S, D]`, `[L, B, K, D, S]` or `[L, B, K, S]`, the last two `turned`,
    copied to `buffer [depth, rows, K, ...]`."""

    hbm: Any  # references
    buffer: Any
    turned: bool

    def copy(self, layer, row, start, size, slot, u: int, semaphore):
        window, whole = pl.ds(start, size), pl.ds(0, size)
        lead = (slice(None),) * (len(self.hbm.shape) - 4 if self.turned else 0)
        source = self.hbm.at[(layer, row, slice(None), *lead, window)]
        target = self.buffer.at[(slot, u, slice(None), *lead, whole)]
        return pltpu.make_async_copy(source, target, semaphore)


@dataclass(frozen=True)
class Stream:
    """The ring of buffers. `state`, in SMEM: the item and chunk to fetch next, chunks fetched, chunks used."""

    spans: Spans
    sources: Sequence[Source]
    layer: jax.Array
    core: jax.Array
    depth: int
    state: Any
    semaphores: Any  # [depth, sources]

    def _copies(self, i, j, slot, act: Callable) -> None:
        row, split = self.spans.item(self.core, i)
        for u in range(self.spans.rows):
            high, start = self.spans.live(row + u, split)[1:]
            align = self.spans.align
            start = pl.multiple_of(start + j * self.spans.kv, align)
            size = aligned(jnp.minimum(high - start, self.spans.kv) + (align - 1), align)
            size = pl.multiple_of(size, align)

            @pl.when(size > 0)
            def _(start=start, size=size, u=u):
                for n, source in enumerate(self.sources):
                    act(source.copy(self.layer, row + u, start, size, slot, u, self.semaphores.at[slot, n]))

    def begin(self) -> None:
        """Before a core's first item."""
        for n in range(4):
            self.state[n] = jnp.int32(0)
        for _ in range(self.depth - 1):
            self.fetch()

    def fetch(self) -> None:
        """Begins to copy the next chunk that there is, of whichever item."""
        last = self.spans.items - 1

        def used_up(place):
            i, j = place
            return (i <= last) & (j >= self.spans.chunks(*self.spans.item(self.core, jnp.minimum(i, last))))

        i, j = jax.lax.while_loop(
            used_up, lambda place: (place[0] + 1, jnp.int32(0)), (self.state[0], self.state[1])
        )
        self.state[0] = i
        self.state[1] = j + 1

        @pl.when(i <= last)
        def _():
            self._copies(i, j, self.state[2] % self.depth, lambda copy: copy.start())
            self.state[2] = self.state[2] + 1

    def next(self, i, j) -> jax.Array:
        """The buffer that holds chunk j of item i, once it has arrived. The one used before may be written to."""
        self.fetch()
        slot = self.state[3] % self.depth
        self.state[3] = self.state[3] + 1
        self._copies(i, j, slot, lambda copy: copy.wait())
        return slot
