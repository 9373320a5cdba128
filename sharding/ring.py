"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel past resting queries.

With zig-zag order (`sharding.zigzag`) chip i has the chunks i and 2s-1-i of C tokens each, and at step r the keys
of chip j = (i - r) mod s. Its late chunk always sees j's early one. Besides, its early chunk sees j's early one
(j < i), or its late chunk sees j's late one (j > i). So every chip attends to two whole pairs of chunks at every
step, none of them masked, and which pair is the second one is an index into arrays that hold the chunks apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention
from pallas_kernels.errors import InputError
from pallas_kernels.merge import add_partial
from sharding.collectives import index, rotate, size
from sharding.zigzag import AXIS

EARLY, LATE = 0, 1
KV = tuple[jax.Array, jax.Array]  # [chunks, B, K, C, D]
Partial = tuple[jax.Array, jax.Array]  # float32 [2, B, N, C, D] and [2, B, N, C]


@overload
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str = AXIS,
    lengths: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str = AXIS,
    lengths: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str = AXIS,
    lengths: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: bool = False,
):
    """Causal attention of a pass that starts its rows, its tokens split over the mesh axis in zig-zag order.

    For use inside `shard_map`. K and V go round the chips, from neighbour to neighbour, while each chip attends to
    what came before. Under a window only chunks that some query sees travel, early ones forwards and late ones
    backwards. Differentiable.

    Args:
      q: `[B, N, T, D]`, this chip's T = 2C tokens; k, v: `[B, K, T, D]`; rotated to their true positions.
      lengths: int32 `[B]`, real tokens of each row over all chips; None: all. Tokens beyond may hold NaN.
      window, scale, softcap, sinks, alibi_slopes: as for `flash_attention`; positions are those in the whole row.
      return_lse: also the log-sum-exp of the scores, sinks included.

    Returns:
      `out [B, N, T, D]` in q's dtype and, if asked for, lse float32 `[B, N, T]`; of no meaning for tokens beyond.

    Raises:
      InputError: an odd number of local tokens, or keys and queries of different numbers.
    """
    chips, tokens = size(axis), q.shape[2]
    mask: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
    if chips == 1:
        out, lse = flash_attention(q, k, v, lengths=lengths, sinks=sinks, return_lse=True, **mask)
        return (out, lse) if return_lse else out
    if tokens % 2 or k.shape[2] != tokens:
        raise InputError(
            f"q has {tokens} and k has {k.shape[2]} tokens a chip, but both must have the same even number: "
            f"pad the whole pass to a multiple of {2 * chips}."
        )
    ring = _Ring(chips, index(axis), tokens // 2, lengths, mask)
    q, k, v = (_apart(x) for x in (q, k, v))
    out, lse = ring.attend(q, (k, v), sinks, axis)
    out = _together(out.astype(q.dtype))
    return (out, jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], tokens)) if return_lse else out


def ring_steps(chips: int, chunk: int, window: int | None) -> tuple[int, int]:
    """How often K and V travel forwards and backwards round the ring: (chips - 1, 0) unless a window needs less.

    chunk: tokens of a chunk, half a chip's.
    """
    far = 2 * chips if window is None else -(-(window - 1) // chunk)  # chunks back to the oldest key seen
    return (far, far) if 2 * far < chips - 1 else (chips - 1, 0)


@dataclass(frozen=True)
class _Ring:
    chips: int
    chip: jax.Array
    chunk: int
    lengths: jax.Array | None
    mask: dict[str, Any]

    @property
    def window(self) -> int | None:
        return self.mask["window"]

    def attend(self, q: jax.Array, kv: KV, sinks: jax.Array | None, axis: str) -> Partial:
        forwards, backwards = ring_steps(self.chips, self.chunk, self.window)
        if backwards == forwards == 0:
            return self._own(q, kv, sinks, cross=False)
        if backwards:
            wide = forwards > 1
            streams, moves = (_each(kv, lambda x: x[:1]), kv if wide else _each(kv, lambda x: x[1:])), (1, -1)
            visit = self._visit_both
        else:
            streams, moves, visit = (kv,), (1,), self._visit

        def move(streams):
            return tuple(rotate(x, axis, by) for x, by in zip(streams, moves, strict=True))

        def step(carry, r):
            total, streams = carry
            coming = move(streams)  # before the products, so that it travels meanwhile
            return (visit(total, q, streams, r), coming), None

        streams = move(streams)
        total = self._own(q, kv, sinks, cross=True)
        if forwards > 1:
            order = jnp.arange(1, forwards, dtype=jnp.int32)
            (total, streams), _ = jax.lax.scan(step, (total, streams), order)
        return visit(total, q, streams, jnp.int32(forwards))

    def _visit(self, total: Partial, q: jax.Array, streams: tuple[KV, ...], r) -> Partial:
        """`total` and what is seen of all keys of the chip r places behind."""
        (kv,), other = streams, (self.chip - r) % self.chips
        which = (other > self.chip).astype(jnp.int32)
        total = self._add(total, q, kv, 0, (LATE, EARLY), other, seen=True)
        return self._add(total, q, kv, which, (which, which), other, seen=True)

    def _visit_both(self, total: Partial, q: jax.Array, streams: tuple[KV, ...], r) -> Partial:
        """`total` and what is seen, under a window, of early keys r places behind and keys r places ahead.

        Late queries and early keys of different chips are two chunks apart at least: those ahead have their early
        chunk with them only if a window goes that far.
        """
        (early, late), wide = streams, streams[1][0].shape[0] > 1
        behind, ahead = (self.chip - r) % self.chips, (self.chip + r) % self.chips
        total = self._add(total, q, early, 0, (EARLY, EARLY), behind)
        total = self._add(total, q, late, int(wide), (LATE, LATE), ahead)
        if wide:
            total = self._add(total, q, early, 0, (LATE, EARLY), behind)
            total = self._add(total, q, late, 0, (LATE, EARLY), ahead)
        return total

    def _own(self, q: jax.Array, kv: KV, sinks: jax.Array | None, cross: bool) -> Partial:
        """A chip's queries and its own keys: both chunks with themselves, the late one with the early one."""
        one = q.shape[1]
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, *kv)]
        rest: dict[str, Any] = {}
        if self.lengths is not None:
            rest["lengths"] = jnp.concatenate([self._real(self._place(c, self.chip)) for c in (EARLY, LATE)])
        out, lse = flash_attention(*flat, sinks=sinks, return_lse=True, **rest, **self.mask)
        total = (
            out.astype(jnp.float32).reshape(2, one, *out.shape[1:]),
            lse.reshape(2, one, *lse.shape[1:]),
        )
        return self._add(total, q, kv, 0, (LATE, EARLY), self.chip, seen=True) if cross else total

    def _add(self, total: Partial, q: jax.Array, kv: KV, at, pair: tuple, other: jax.Array, seen=False) -> Partial:
        """`total`, and what this chip's chunk pair[0] sees of chunk pair[1] of the chip `other`, entry `at` of kv.

        seen: the keys come before all of the queries, so that without windows and biases there is no mask.
        """
        mine, theirs = self._place(pair[0], self.chip), self._place(pair[1], other)
        rest: dict[str, Any] = dict(q_offset=(mine - theirs) * self.chunk)
        if seen and self.window is None and self.mask["alibi_slopes"] is None:
            rest = dict(causal=False)
        if self.lengths is not None:
            rest["lengths"] = self._real(theirs)
        queries, *old = (jax.lax.dynamic_index_in_dim(x, pair[0], keepdims=False) for x in (q, *total))
        part = flash_attention(queries, *kv, layer=at, return_lse=True, **rest, **self.mask)
        new = add_partial((old[0], old[1]), part)
        out, lse = (jax.lax.dynamic_update_index_in_dim(x, y, pair[0], 0) for x, y in zip(total, new, strict=True))
        return out, lse

    def _place(self, which, chip: jax.Array) -> jax.Array:
        """The number of a chip's early or late chunk."""
        return jnp.where(jnp.asarray(which) == EARLY, chip, 2 * self.chips - 1 - chip)

    def _real(self, chunk: jax.Array) -> jax.Array:
        """int32 [B]: real tokens of a chunk."""
        assert self.lengths is not None
        return jnp.clip(self.lengths - chunk * self.chunk, 0, self.chunk)


def _each(kv: KV, part: Callable[[jax.Array], jax.Array]) -> KV:
    return part(kv[0]), part(kv[1])


def _apart(x: jax.Array) -> jax.Array:
    """[B, H, T, D] -> [2, B, H, T / 2, D]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], 2, -1, x.shape[3]), 2, 0)


def _together(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[4])
