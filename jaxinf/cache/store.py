"""What the slots of a cache hold: keys and values in some form, and attention over them.

Which token lies in which slot is the cache's affair: a store is told where tokens start and how many there are.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels import cache_append, flash_attention, flash_decode
from pallas_kernels.stored import BFLOAT16_BITS, from_bits

Turn = Callable[[jax.Array, jax.Array], jax.Array]
"""`(keys [B, K, n, D], tokens int32 [B, n]) -> keys` rotated to where those tokens stand; a row's tokens are
counted as the cache counts them for its store."""


class Store(abc.ABC):
    """Keys and values `[B, K, S, D]` of one layer, or of L stacked along a leading axis; a pytree.

    Everywhere, `layer` is the index into a stack (int or int32 scalar), None without one; `starts`, `counts` and
    `ring` are those of `cache_append`; other keywords are those of `flash_attention`.
    """

    grouped: ClassVar[bool] = False
    """Keys come as they are before rope, and consecutive tokens are rounded together. Else they come rotated."""

    @property
    @abc.abstractmethod
    def slots(self) -> int:
        """S."""

    @property
    def append_limit(self) -> int | None:
        """How many of the latest tokens may be taken back; None: all."""
        return None

    @abc.abstractmethod
    def append(self, k, v, layer, starts, counts, *, ring: bool = False) -> Store:
        """With `k, v [B, K, T, D]` stored."""

    @abc.abstractmethod
    def rounded_keys(self, k, starts, counts) -> jax.Array:
        """Keys `[B, K, T, D]`, as `append` takes them, as they are read once they are stored, in their dtype. Rows
        may be others than the store's."""

    @abc.abstractmethod
    def rounded_values(self, v) -> jax.Array:
        """Values `[B, K, T, D]` as they are read, in their dtype."""

    @abc.abstractmethod
    def decode(self, q, lengths, *, layer, turn: Turn, ring: bool = False, return_lse: bool = False, **mask) -> Any:
        """`flash_decode`: what the newest few tokens `q [B, N, T, D]`, rotated, see."""

    @abc.abstractmethod
    def attend(self, q, *, layer, lengths, turn: Turn, q_offset=None, return_lse: bool = False, **mask) -> Any:
        """`flash_attention` over all slots, without a ring: what many tokens see."""

    @abc.abstractmethod
    def latest(self, starts, count: int, *, layer, dtype, turn: Turn) -> tuple[jax.Array, jax.Array]:
        """The `count` tokens before `starts` in a ring, in order: k and v `[B, K, count, D]`, keys rotated."""

    @abc.abstractmethod
    def move(self, starts, path, counts, *, ring: bool = False) -> Store:
        """With the slots `starts + path[:, i]`, i below `counts`, moved to `starts + i`, in every layer; `path` is
        that of `LayerCache.commit`."""

    @abc.abstractmethod
    def map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> Store:
        """With `change(array, its axis of rows)` in place of every array."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Floats(Store):
    """Keys, rotated, and values as they are, or in another dtype that `flash_decode` takes."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype) -> Floats:
        # Two arrays, not one twice: donated buffers must differ.
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def append(self, k, v, layer, starts, counts, *, ring=False):
        k, v = (
            cache_append(x, new, layer, starts, counts=counts, ring=ring) for x, new in ((self.k, k), (self.v, v))
        )
        return Floats(k, v)

    def rounded_keys(self, k, starts, counts):
        return k

    def rounded_values(self, v):
        return v

    def decode(self, q, lengths, *, layer, turn, **options):
        return flash_decode(q, self.k, self.v, lengths, layer=layer, **options)

    def attend(self, q, *, layer, turn, **options):
        if self.k.dtype == q.dtype:
            return flash_attention(q, self.k, self.v, layer=layer, **options)
        return flash_attention(q, *(read_layer(x, layer, q.dtype) for x in (self.k, self.v)), **options)

    def latest(self, starts, count, *, layer, dtype, turn):
        at = before(starts, count) % self.slots
        return floats(pick(self.k, layer, at), dtype), floats(pick(self.v, layer, at), dtype)

    def move(self, starts, path, counts, *, ring=False):
        return Floats(*(moved(x, starts, path, counts, axis=x.ndim - 2, ring=ring) for x in (self.k, self.v)))

    def map_rows(self, change):
        return dataclasses.replace(self, **{name: change(x, x.ndim - 4) for name, x in vars(self).items()})


def moved(
    x: jax.Array, starts: jax.Array, path: jax.Array, counts: jax.Array, *, axis: int, ring: bool
) -> jax.Array:
    """`x [.., B, K, S, ..]`, slots along `axis`, after `Store.move`.

    One slot after another: none is written to before it has been read, since path[b, i] >= i and rises; the root
    stays. Slices of one slot are updated in place, which a gather and a scatter of all would not be.
    """
    rows, slots, width = axis - 2, x.shape[axis], path.shape[1]
    shape = [1 if a in (rows, axis) else n for a, n in enumerate(x.shape)]

    def place(row, slot):
        return [row if a == rows else slot if a == axis else 0 for a in range(x.ndim)]

    def one(n, x):
        row, i = n // (width - 1), n % (width - 1) + 1
        source, target = starts[row] + path[row, i], starts[row] + i
        source, target = (s % slots if ring else jnp.minimum(s, slots - 1) for s in (source, target))
        # What does not move is written where it was.
        source = jnp.where(i < counts[row], source, target)
        return jax.lax.dynamic_update_slice(
            x, jax.lax.dynamic_slice(x, place(row, source), shape), place(row, target)
        )

    return jax.lax.fori_loop(0, starts.shape[0] * (width - 1), one, x)


def before(starts: jax.Array, count: int) -> jax.Array:
    """int32 [B, count]: the tokens before each row's start; negative: none."""
    return starts[:, None] - count + jnp.arange(count)


def read_layer(stored: jax.Array, layer, dtype) -> jax.Array:
    """`[B, K, S, D]` in `dtype` of a cache that may be stacked and may hold the bits of bfloat16."""
    return floats(one_layer(stored, layer), dtype)


def one_layer(x: jax.Array, layer) -> jax.Array:
    return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)


def floats(stored: jax.Array, dtype) -> jax.Array:
    """`stored`, which may hold the bits of bfloat16, in `dtype`."""
    return (from_bits(stored, jnp.bfloat16) if stored.dtype == BFLOAT16_BITS else stored).astype(dtype)


def pick(x: jax.Array, layer, at: jax.Array) -> jax.Array:
    """Slots `at` int32 `[B, n]` of a layer of `x [.., B, K, S, ...]`: `[B, K, n, ...]`.

    Copies the layer: a gather from the stack would have a TPU lay out all of it in another way.
    """
    x = one_layer(x, layer)
    return jnp.take_along_axis(x, at.reshape(at.shape[0], 1, at.shape[1], *[1] * (x.ndim - 3)), axis=2)


def after(x: jax.Array, result: jax.Array) -> jax.Array:
    """The integers `x`, which XLA can only know once it has computed all of `result`.

    A write that depends on them comes after the reads that `result` rests on. Without an order between them
    XLA copies the cache, and an optimisation barrier does not last until it decides.
    """
    bits = jnp.sum(jax.lax.bitcast_convert_type(result.astype(jnp.float32), jnp.int32))
    return x + (bits * bits & 2)  # squares are 0 or 1 modulo 4
