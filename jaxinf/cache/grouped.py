"""Keys and values in four bits: keys a channel and group of tokens, before rope; values a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinf.cache import nibbles
from jaxinf.cache.blocks import Partial, add_blocks, attend_in_blocks, attend_masked, cut, with_sinks
from jaxinf.cache.store import Store, after, before, floats, pick, read_layer
from pallas_kernels import cache_append, chips, flash_attention
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.masks import ring_positions
from pallas_kernels.merge import add_partial

GROUP = 64
"""Consecutive tokens whose keys share a range in each channel."""

RECENT = 2 * GROUP
"""Latest tokens of which floats are kept: those of a group that is not over, and what may be taken back."""


def boundary(lengths: jax.Array) -> jax.Array:
    """int32 [B]: of so many tokens, how many have their keys in groups: all but the last 1 to `GROUP`."""
    return jnp.maximum(lengths - 1, 0) // GROUP * GROUP


_NO_TREES = "an int4 cache takes chains of drafted tokens, not trees: take a drafter of chains, or cache='int8'"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grouped(Store):
    """int4, as KVQuant (Hooper et al. 2024, arXiv:2401.18079) and KIVI (Liu et al. 2024, arXiv:2402.02750) advise.

    Some channels of keys are large in all tokens, until rope mixes them in pairs; values have no such channels. So
    keys are stored before rope and rounded in groups of `GROUP` tokens, each channel between its least and largest
    value there, and values token by token, between a head's least and largest one: no number moves by more than
    half a fifteenth of its range (`nibbles.encode` has the formula). A group is rounded when it is over; the keys
    of the latest tokens wait as floats. Groups are of tokens as this store counts them.

    A query of a pass of a few tokens sees keys in groups that ended before its own as rounded, others as floats,
    however tokens came to be there. In longer passes it sees all groups that are over when the pass is as rounded.

    k, v: int8 `[.., B, K, S, D / 2]`, two channels a number; S a multiple of `GROUP`.
    k_range: float32 `[.., B, K, S / GROUP, D]`. v_range: float32 `[.., B, K, S]`.
    recent_k, recent_v: `[.., B, K, RECENT, D]`, keys, and values as they are read; token p in slot p mod RECENT.
    """

    grouped: ClassVar[bool] = True

    k: jax.Array
    v: jax.Array
    k_range: jax.Array
    v_range: jax.Array
    recent_k: jax.Array
    recent_v: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype) -> Grouped:
        *lead, slots, dim = shape
        if dim % 2:
            raise UnsupportedError(f"head_dim={dim} is odd, but an int4 cache packs channels in pairs: use int8.")
        whole = chips.LANES if chips.platform() == "tpu" else GROUP
        slots += -slots % whole
        k, v = (jnp.zeros((*lead, slots, dim // 2), jnp.int8) for _ in range(2))
        ranges = jnp.zeros((*lead, slots // GROUP, dim), jnp.float32), jnp.zeros((*lead, slots), jnp.float32)
        return cls(k, v, *ranges, *(jnp.zeros((*lead, RECENT, dim), dtype) for _ in range(2)))

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    @property
    def append_limit(self) -> int | None:
        return RECENT - GROUP

    def append(self, k, v, layer, starts, counts, *, ring=False):
        tokens = k.shape[2]
        counts = jnp.full_like(starts, tokens) if counts is None else counts
        first = boundary(starts)
        over = boundary(starts + counts) - first  # tokens of the groups that are over now
        groups = (GROUP - 1 + tokens) // GROUP
        if tokens <= RECENT - GROUP:
            recent_k = cache_append(self.recent_k, k, layer, starts, counts=counts, ring=True)
            keys = recent(recent_k, layer, first, groups * GROUP, k.dtype)
        else:
            old = recent(self.recent_k, layer, first, GROUP, k.dtype)
            at = jnp.arange(groups * GROUP)
            waited = (starts - first)[:, None]
            at = jnp.minimum(jnp.where(at < waited, at, GROUP + at - waited), GROUP + tokens - 1)
            keys = jnp.take_along_axis(jnp.concatenate([old, k], axis=2), at[:, None, :, None], axis=2)
            recent_k = cache_append(self.recent_k, k, layer, starts, counts=after(counts, keys), ring=True)
        codes, ranges = nibbles.encode(keys.reshape(*keys.shape[:2], groups, GROUP, -1), 3)
        codes = nibbles.pack(codes.reshape(keys.shape))
        k_codes = cache_append(self.k, codes, layer, first, counts=over, ring=ring)
        k_range = cache_append(self.k_range, ranges, layer, first // GROUP, counts=over // GROUP, ring=ring)
        codes, ranges = nibbles.encode(v, 3)
        options: dict[str, Any] = dict(counts=counts, ring=ring, scales=self.v_range, new_scales=ranges)
        v_codes, v_range = cache_append(self.v, nibbles.pack(codes), layer, starts, **options)
        seen = nibbles.decode(codes, ranges[..., None]).astype(v.dtype)
        recent_v = cache_append(self.recent_v, seen, layer, starts, counts=counts, ring=True)
        return Grouped(k_codes, v_codes, k_range, v_range, recent_k, recent_v)

    def rounded_keys(self, k, starts, counts):
        tokens = k.shape[2]
        if tokens < GROUP:
            return k
        ends = starts + (tokens if counts is None else counts)
        skip = (-starts % GROUP)[:, None]  # to the first group that begins here
        at = jnp.minimum(skip + jnp.arange(tokens // GROUP * GROUP), tokens - 1)
        keys = jnp.take_along_axis(k, at[:, None, :, None], axis=2)
        grouped = keys.reshape(*keys.shape[:2], -1, GROUP, keys.shape[3])
        codes, ranges = nibbles.encode(grouped, 3)
        back = nibbles.decode(codes, ranges[..., None, :]).reshape(keys.shape).astype(k.dtype)
        t = jnp.arange(tokens)
        place = jnp.clip(t - skip, 0, keys.shape[2] - 1)
        over = (t >= skip) & (t - skip < keys.shape[2]) & (starts[:, None] + t < boundary(ends)[:, None])
        moved = jnp.take_along_axis(back, place[:, None, :, None], axis=2)
        return jnp.where(over[:, None, :, None], moved, k)

    def rounded_values(self, v):
        codes, ranges = nibbles.encode(v, 3)
        return nibbles.decode(codes, ranges[..., None]).astype(v.dtype)

    def decode(self, q, lengths, *, layer, turn, ring=False, return_lse=False, sinks=None, **mask):
        if mask.pop("ancestor_mask", None) is not None:
            raise UnsupportedError(_NO_TREES)
        query = lengths[:, None] - q.shape[2] + jnp.arange(q.shape[2])  # where they stand
        complete = boundary(query + 1)[..., None]
        window = mask.pop("window", None)

        def part(k, v, tokens, seen) -> Partial:
            """Attention to keys and values of `tokens` int32 [B, n]; seen: bool [B, T, n]."""
            distance = tokens[:, None] - query[..., None]
            seen &= (tokens >= 0)[:, None] & (distance <= 0)
            seen = seen if window is None else seen & (distance > -window)
            return attend_masked(q, turn(k, tokens), v, seen, distance, **mask)

        def block(start, size: int) -> Partial:
            slots = start + jnp.arange(size)
            tokens = ring_positions(boundary(lengths), self.slots, slots) if ring else slots[None]
            tokens = jnp.broadcast_to(tokens, (q.shape[0], size))
            return part(*self._block(layer, start, size, q.dtype), tokens, tokens[:, None] < complete)

        first = jnp.int32(0) if window is None or ring else jnp.maximum(jnp.min(query) - window + 1, 0)
        grouped = add_blocks(q, block, self.slots, first, jnp.max(boundary(lengths)))
        tokens = ring_positions(lengths, RECENT, jnp.arange(RECENT))
        keys, values = (read_layer(x, layer, q.dtype) for x in (self.recent_k, self.recent_v))
        whole = add_partial(grouped, part(keys, values, tokens, tokens[:, None] >= complete))
        return with_sinks(whole, sinks, q.dtype, return_lse)

    def attend(self, q, *, layer, lengths, turn, q_offset=None, return_lse=False, sinks=None, **mask):
        complete = boundary(lengths)

        def widen(start, size: int):
            k, v = self._block(layer, start, size, q.dtype)
            return turn(k, jnp.broadcast_to(start + jnp.arange(size), (q.shape[0], size))), v

        grouped = attend_in_blocks(q, widen, self.slots, lengths=complete, q_offset=q_offset, **mask)
        at = complete[:, None] + jnp.arange(GROUP)
        keys, values = (recent(x, layer, complete, GROUP, q.dtype) for x in (self.recent_k, self.recent_v))
        first = jnp.zeros_like(lengths) if q_offset is None else q_offset
        window, causal = mask.pop("window", None), mask.pop("causal", True)
        sides = window if causal or window is None else (window - 1, None)
        given: dict[str, Any] = dict(q_offset=first - complete, lengths=lengths - complete, causal=causal)
        rest = flash_attention(q, turn(keys, at), values, return_lse=True, window=sides, **given, **mask)
        return with_sinks(add_partial(grouped, rest), sinks, q.dtype, return_lse)

    def latest(self, starts, count, *, layer, dtype, turn):
        tokens = before(starts, count)
        at = jnp.where(tokens < 0, 0, tokens) % self.slots
        codes, ranges = pick(self.k, layer, at), pick(self.k_range, layer, at // GROUP)
        k = nibbles.decode(nibbles.unpack(codes), ranges).astype(dtype)
        codes, ranges = pick(self.v, layer, at), pick(self.v_range, layer, at)
        v = nibbles.decode(nibbles.unpack(codes), ranges[..., None]).astype(dtype)
        waiting = floats(pick(self.recent_k, layer, jnp.where(tokens < 0, 0, tokens) % RECENT), dtype)
        over = (tokens < boundary(starts)[:, None])[:, None, :, None]
        return turn(jnp.where(over, k, waiting), tokens), v

    def _block(self, layer, start, size: int, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys, not rotated, and values of some slots, `[B, K, size, D]`."""
        codes = nibbles.unpack(cut(self.k, layer, start, size))
        ranges = cut(self.k_range, layer, start // GROUP, size // GROUP)
        shape = (*codes.shape[:2], -1, GROUP, codes.shape[3])
        k = nibbles.decode(codes.reshape(shape), ranges[..., None, :]).reshape(codes.shape)
        v = nibbles.decode(
            nibbles.unpack(cut(self.v, layer, start, size)), cut(self.v_range, layer, start, size)[..., None]
        )
        return k.astype(dtype), v.astype(dtype)

    def move(self, starts, path, counts, *, ring=False):
        raise UnsupportedError(_NO_TREES)

    def map_rows(self, change):
        axis = self.k.ndim - 4
        return Grouped(*(change(x, axis) for x in vars(self).values()))


def recent(stored: jax.Array, layer, first: jax.Array, count: int, dtype) -> jax.Array:
    """What is kept of `count` tokens from `first` int32 [B] on, as far as they are recent."""
    return floats(pick(stored, layer, (first[:, None] + jnp.arange(count)) % RECENT), dtype)
