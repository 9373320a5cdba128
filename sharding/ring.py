"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel past resting queries.

With zig-zag order (`sharding.zigzag`) chip i has the chunks i and 2s-1-i of C tokens each, and at step r the keys
of chip j = (i - r) mod s. Its late chunk always sees j's early one. Besides, its early chunk sees j's early one
(j < i), or its late chunk sees j's late one (j > i). So every chip attends to two whole pairs of chunks at every
step, none of them masked, and which pair is the second one is a matter of where slices begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import chips, flash_attention
from pallas_kernels.errors import InputError
from pallas_kernels.merge import add_partial
from sharding.collectives import index, rotate, size
from sharding.zigzag import AXIS

EARLY, LATE = 0, 1
SHARE = 128
"""The float32 sums of a pass take at most this part of the chip's memory at a time."""

KV = tuple[jax.Array, jax.Array]  # [B, K, 2C, D], or one chunk of it
Partial = tuple[jax.Array, jax.Array]  # float32 [B, N, 2C, D] and [B, N, 2C]


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
    count, tokens = size(axis), q.shape[2]
    mask: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
    if count == 1:
        out, lse = flash_attention(q, k, v, lengths=lengths, sinks=sinks, return_lse=True, **mask)
        return (out, lse) if return_lse else out
    if tokens % 2 or k.shape[2] != tokens:
        raise InputError(
            f"q has {tokens} and k has {k.shape[2]} tokens a chip, but both must have the same even number: "
            f"pad the whole pass to a multiple of {2 * count}."
        )
    ring = _Ring(count, index(axis), tokens // 2, axis, lengths, mask)
    parts = head_groups(q.shape[0] * q.shape[1] * tokens * v.shape[3], k.shape[1])
    if parts == 1:
        out, lse = ring.attend(q, (k, v), sinks)
        return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)

    def some_heads(i, results):
        given = [_part(x, i, parts, 1) for x in (q, k, v)]
        per_head = [None if x is None else _part(x, i, parts, 0) for x in (sinks, alibi_slopes)]
        own = replace(ring, mask=ring.mask | dict(alibi_slopes=per_head[1]))
        found = own.attend(given[0], (given[1], given[2]), per_head[0])
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), i * y.shape[1], 1)
            for x, y in zip(results, found, strict=True)
        )

    empty = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.zeros(q.shape[:3], jnp.float32)
    out, lse = jax.lax.fori_loop(0, parts, some_heads, empty)
    return (out, lse) if return_lse else out


def head_groups(numbers: int, kv_heads: int) -> int:
    """Into how many parts the heads are taken one after another, so that float32 sums of `numbers` stay small.

    Long passes alone are parted, whose transfers hide behind their products however few heads take part.
    """
    fitting = int(chips.current().hbm / SHARE)
    return next((n for n in range(1, kv_heads) if kv_heads % n == 0 and 4 * numbers <= n * fitting), kv_heads)


def _part(x: jax.Array, i: jax.Array, parts: int, dim: int) -> jax.Array:
    each = x.shape[dim] // parts
    return jax.lax.dynamic_slice_in_dim(x, i * each, each, dim)


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
    axis: str
    lengths: jax.Array | None
    mask: dict[str, Any]

    @property
    def window(self) -> int | None:
        return self.mask["window"]

    def attend(self, q: jax.Array, kv: KV, sinks: jax.Array | None) -> Partial:
        forwards, backwards = ring_steps(self.chips, self.chunk, self.window)
        if backwards == forwards == 0:
            return self._own(q, kv, sinks)
        if backwards:
            late = kv if forwards > 1 else self._chunk(kv, LATE)
            streams, moves, visit = (self._chunk(kv, EARLY), late), (1, -1), self._visit_both
        else:
            streams, moves, visit = (kv,), (1,), self._visit

        def move(streams):
            return tuple(rotate(x, self.axis, by) for x, by in zip(streams, moves, strict=True))

        def step(carry, r):
            total, streams = carry
            coming = move(streams)  # before the products, so that it travels meanwhile
            return (visit(total, q, streams, r), coming), None

        streams = move(streams)
        total = self._own(q, kv, sinks)
        if forwards > 1:
            order = jnp.arange(1, forwards, dtype=jnp.int32)
            (total, streams), _ = jax.lax.scan(step, (total, streams), order)
        return visit(total, q, streams, jnp.int32(forwards))

    def _visit(self, total: Partial, q: jax.Array, streams: tuple[KV, ...], r) -> Partial:
        """`total` and what is seen of all keys of the chip r places behind."""
        (kv,), other = streams, (self.chip - r) % self.chips
        which = (other > self.chip).astype(jnp.int32)
        for pair in (LATE, EARLY), (which, which):
            total = self._add(total, q, self._chunk(kv, pair[1]), pair, other, seen=True)
        return total

    def _visit_both(self, total: Partial, q: jax.Array, streams: tuple[KV, ...], r) -> Partial:
        """`total` and what is seen, under a window, of early keys r places behind and keys r places ahead.

        Late queries and early keys of different chips are two chunks apart at least: those ahead have their early
        chunk with them only if a window goes that far.
        """
        early, ahead = streams
        places = (self.chip - r) % self.chips, (self.chip + r) % self.chips
        wide = ahead[0].shape[2] > self.chunk
        total = self._add(total, q, early, (EARLY, EARLY), places[0])
        total = self._add(total, q, self._chunk(ahead, LATE) if wide else ahead, (LATE, LATE), places[1])
        if wide:
            total = self._add(total, q, early, (LATE, EARLY), places[0])
            total = self._add(total, q, self._chunk(ahead, EARLY), (LATE, EARLY), places[1])
        return total

    def _own(self, q: jax.Array, kv: KV, sinks: jax.Array | None) -> Partial:
        """A chip's queries and its own keys: both chunks with themselves, the late one with the early one."""
        rest: dict[str, Any] = {} if self.lengths is None else dict(lengths=self._real(EARLY) + self._real(LATE))
        if not self._by_distance:  # then the chunks may as well follow each other
            out, lse = flash_attention(q, *kv, sinks=sinks, return_lse=True, **rest, **self.mask)
            return out.astype(jnp.float32), lse
        parts = []
        for chunk in (EARLY, LATE):
            rest = {} if self.lengths is None else dict(lengths=self._real(chunk))
            own = self._cut(q, chunk), *self._chunk(kv, chunk)
            parts.append(flash_attention(*own, sinks=sinks, return_lse=True, **rest, **self.mask))
        out, lse = (jnp.concatenate([part[i] for part in parts], axis=2) for i in range(2))
        total = out.astype(jnp.float32), lse
        if self.window == 1:
            return total
        return self._add(total, q, self._chunk(kv, EARLY), (LATE, EARLY), self.chip)

    def _add(self, total: Partial, q: jax.Array, kv: KV, pair: tuple, other: jax.Array, seen=False) -> Partial:
        """`total`, and what this chip's chunk pair[0] sees of kv, which is chunk pair[1] of the chip `other`.

        seen: the keys come before all of the queries, so that without windows and biases there is no mask.
        """
        mine, theirs = self._place(pair[0], self.chip), self._place(pair[1], other)
        rest: dict[str, Any] = dict(q_offset=(mine - theirs) * self.chunk)
        if seen and not self._by_distance:
            rest = dict(causal=False)
        if self.lengths is not None:
            rest["lengths"] = self._real(pair[1], other)
        part = flash_attention(self._cut(q, pair[0]), *kv, return_lse=True, **rest, **self.mask)
        old = self._cut(total[0], pair[0]), self._cut(total[1], pair[0])
        out, lse = (
            jax.lax.dynamic_update_slice_in_dim(x, y, pair[0] * self.chunk, 2)
            for x, y in zip(total, add_partial(old, part), strict=True)
        )
        return out, lse

    @property
    def _by_distance(self) -> bool:
        """Whether it matters how far keys are."""
        return self.window is not None or self.mask["alibi_slopes"] is not None

    def _cut(self, x: jax.Array, which) -> jax.Array:
        """The early or late chunk along axis 2."""
        return jax.lax.dynamic_slice_in_dim(x, which * self.chunk, self.chunk, 2)

    def _chunk(self, kv: KV, which) -> KV:
        return self._cut(kv[0], which), self._cut(kv[1], which)

    def _place(self, which, chip: jax.Array) -> jax.Array:
        """The number of a chip's early or late chunk."""
        return jnp.where(jnp.asarray(which) == EARLY, chip, 2 * self.chips - 1 - chip)

    def _real(self, which, chip: jax.Array | None = None) -> jax.Array:
        """int32 [B]: real tokens of a chip's chunk; of this one by default."""
        assert self.lengths is not None
        place = self._place(which, self.chip if chip is None else chip)
        return jnp.clip(self.lengths - place * self.chunk, 0, self.chunk)
