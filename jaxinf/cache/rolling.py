"""Caches of bounded memory: a sliding window, and a window with attention sinks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.cache.base import (
    DECODE_TOKENS,
    AttentionRule,
    LayerCache,
    Step,
    as_read,
    attend_alone,
    to_store,
    tree_mask,
)
from jaxinf.cache.kinds import Kind, empty, ring_spare
from jaxinf.cache.store import Store, after, read_layer
from pallas_kernels import cache_append, flash_attention
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.merge import merge_partials
from sharding import zigzag

_NO_TREES = (
    "caches with attention sinks take chains of drafted tokens, not trees: take a drafter of chains, or sinks=0"
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RollingCache(LayerCache):
    """The latest `window + max_append - 1` tokens of each row: token p lives in slot p mod S.

    Of S slots, `window` belong to a query; the others let the first of `max_append` appended tokens still
    find its whole window, and let up to `max_append - 1` tokens be taken back. Keys have the angles of their
    absolute positions.
    """

    store: Store
    window: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def zeros(
        cls,
        layers: int | None,
        batch: int,
        kv_heads: int,
        window: int,
        head_dim: int,
        dtype,
        *,
        max_append: int,
        kind: Kind | None = None,
    ) -> RollingCache:
        slots = window + max_append - 1 + ring_spare(kind)
        return cls(empty((layers, batch, kv_heads, slots, head_dim), dtype, kind), window)

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        out, cache, _ = self._attend(q, k, v, step, rule, layer)
        return out, cache

    def _attend(self, q, k, v, step: Step, rule: AttentionRule, layer) -> tuple[jax.Array, RollingCache, jax.Array]:
        """`step`: `(out, the cache after, log-sum-exp float32 [B, N, T])`."""
        rule = dataclasses.replace(rule, window=min(self.window, rule.window or self.window))
        mask: dict[str, Any] = rule.mask | {"return_lse": True}
        tokens, slots = q.shape[2], self.store.slots
        q = rule.turn(q, step.positions)
        if tokens <= min(DECODE_TOKENS, slots - self.window + 1) and not (step.fresh and tokens > 1):
            cache = self.append(k, v, step, rule, layer)
            at = dict(layer=layer, ring=True, turn=rule.turn)
            out, lse = cache.store.decode(q, step.starts + tokens, **at, **mask, **tree_mask(step))
        elif step.tree is not None:
            raise UnsupportedError(
                f"a tree of {tokens} tokens needs a rolling cache made with max_append={tokens}, but this one has "
                f"max_append={slots - self.window + 1}"
            )
        elif step.fresh:
            cache = self.append(k, v, step, rule, layer)
            out, lse = attend_alone(q, *self.as_read(k, v, step, rule), step, rule, return_lse=True)
        else:
            # Read before writing: a long chunk overwrites the window that its first queries look at.
            old = self.window - 1
            kept = self.store.latest(step.starts, old, layer=layer, dtype=q.dtype, turn=rule.turn)
            new = self.as_read(k, v, step, rule)
            both = [jnp.concatenate([o, n], axis=2) for o, n in zip(kept, new, strict=True)]
            # Key column c holds position starts - old + c; those before the row's first token are no tokens.
            absent = jnp.arange(old + tokens)[None] < (old - step.starts)[:, None]
            out, lse = flash_attention(
                q,
                *both,
                q_offset=old,
                lengths=old + step.totals - step.starts,
                q_segment_ids=jnp.zeros((q.shape[0], tokens), jnp.int32),
                kv_segment_ids=absent.astype(jnp.int32),
                **mask,
            )
            written = dataclasses.replace(step, counts=after(step.totals - step.starts, out))
            cache = self.append(k, v, written, rule, layer)
        return out, cache, lse

    def as_read(self, k, v, step: Step, rule: AttentionRule) -> tuple[jax.Array, jax.Array]:
        return as_read(self.store, k, v, step, rule)

    def append(self, k, v, step: Step, rule: AttentionRule, layer) -> RollingCache:
        """Stores keys and values; of a pass that is split over chips, on each what it needs of all."""
        starts, counts = step.starts, step.counts
        k = to_store(self.store, k, step, rule)
        if step.zigzag:
            count = min(self.store.slots, step.tokens)
            starts = jnp.maximum(step.totals - count, 0)
            counts = step.totals - starts
            k, v = (zigzag.take(x, starts[:, None] + jnp.arange(count), 2) for x in (k, v))
        return dataclasses.replace(self, store=self.store.append(k, v, layer, starts, counts, ring=True))

    def commit(self, starts, path, counts) -> RollingCache:
        return dataclasses.replace(self, store=self.store.move(starts, path, counts, ring=True))

    def map_rows(self, change) -> RollingCache:
        return dataclasses.replace(self, store=self.store.map_rows(change))

    @property
    def append_limit(self) -> int | None:
        limits = [n for n in (self.store.slots - self.window, self.store.append_limit) if n is not None]
        return min(limits)

    @property
    def capacity(self) -> int | None:
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SinkCache(LayerCache):
    """A rolling window that also keeps the first tokens: attention sinks (Xiao et al. 2024, StreamingLLM).

    Positions are those within the cache: once the window has left the sinks behind, sink j stands at j,
    the window right after the sinks, the query last. Distances within the window do not change with time, so
    its keys keep absolute angles; sinks are stored unrotated and turned at each step, with a query
    turned to its place in the cache. Until the first token leaves the window this is full attention, exactly.

    sink_k, sink_v: `[B, K, sinks, D]` or `[L, B, K, sinks, D]`, floats whatever the window's kind, keys unrotated.
    """

    rolling: RollingCache
    sink_k: jax.Array
    sink_v: jax.Array

    @classmethod
    def zeros(
        cls,
        layers,
        batch: int,
        kv_heads: int,
        window: int,
        head_dim: int,
        dtype,
        *,
        sinks: int,
        max_append: int,
        kind: Kind | None = None,
    ) -> SinkCache:
        sizes = (layers, batch, kv_heads, window, head_dim)
        rolling = RollingCache.zeros(*sizes, dtype, max_append=max_append, kind=kind)
        lead = () if layers is None else (layers,)
        shape = (*lead, batch, kv_heads, sinks, head_dim)
        return cls(rolling, jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        if step.tree is not None:
            raise UnsupportedError(_NO_TREES)
        window, sinks = self.rolling.window, self.sink_k.shape[-2]
        out, rolling, lse = self.rolling._attend(q, k, v, step, rule, layer)
        order = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32), (q.shape[0], sinks))
        counts = step.counts
        if step.zigzag:
            k, v = (zigzag.take(x, order, 2) for x in (k, v))
            counts = jnp.minimum(step.totals, sinks)
        sink_k = cache_append(self.sink_k, k, layer, step.starts, counts=counts)
        sink_v = cache_append(self.sink_v, v, layer, step.starts, counts=counts)

        place = jnp.minimum(step.positions, window + sinks - 1)
        turned = rule.turn(q, place)
        keys, values = rule.turn(read_layer(sink_k, layer, q.dtype), order), read_layer(sink_v, layer, q.dtype)
        parts = []
        for columns in np.split(np.arange(q.shape[2]), 2 if step.zigzag else 1):  # positions follow each other
            # Sink j is out of the window of a query at t when j <= t - window: causal, with an offset.
            part = flash_attention(
                turned[:, :, columns[0] : columns[-1] + 1],
                keys,
                values,
                q_offset=step.positions[:, columns[0]] - window,
                lengths=jnp.minimum(step.totals, sinks),
                scale=rule.scale,
                softcap=rule.softcap,
                alibi_slopes=rule.alibi_slopes,
                return_lse=True,
            )
            parts.append(part)
        far, far_lse = (jnp.concatenate([part[i] for part in parts], axis=2) for i in range(2))
        if rule.alibi_slopes is not None:
            # Biases by distance came out as if the query stood `window` before its position, not at its place.
            moved = (step.positions - window - place).astype(jnp.float32)
            far_lse = far_lse + rule.alibi_slopes[None, :, None] * moved[:, None, :]
        merged, _ = merge_partials([(out, lse), (far, far_lse)])
        return merged, SinkCache(rolling, sink_k, sink_v)

    def commit(self, starts, path, counts) -> SinkCache:
        raise UnsupportedError(_NO_TREES)

    def map_rows(self, change) -> SinkCache:
        sinks = [change(x, x.ndim - 4) for x in (self.sink_k, self.sink_v)]
        return SinkCache(self.rolling.map_rows(change), *sinks)

    @property
    def append_limit(self) -> int | None:
        return self.rolling.append_limit

    @property
    def capacity(self) -> int | None:
        return None
