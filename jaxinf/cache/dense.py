"""The cache that keeps every token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax

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
from jaxinf.cache.kinds import Kind, empty
from jaxinf.cache.store import Store
from pallas_kernels.errors import UnsupportedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache(LayerCache):
    """Token p of a row lives in slot p."""

    store: Store

    @classmethod
    def zeros(
        cls,
        layers: int | None,
        batch: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype,
        *,
        kind: Kind | None = None,
    ) -> DenseCache:
        return cls(empty((layers, batch, kv_heads, slots, head_dim), dtype, kind))

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        if step.zigzag:
            raise UnsupportedError(
                "DenseCache holds whole rows, but the pass is split over sequence: make the cache under its mesh."
            )
        tokens = q.shape[2]
        q, cache = rule.turn(q, step.positions), self.append(k, v, step, rule, layer)
        options = dict(layer=layer, turn=rule.turn, **rule.mask)
        if step.fresh and tokens > 1:
            out = attend_alone(q, *self.as_read(k, v, step, rule), step, rule)
        elif tokens <= DECODE_TOKENS:
            out = cache.store.decode(q, step.starts + tokens, **options, **tree_mask(step))
        else:
            out = cache.store.attend(q, q_offset=step.starts, lengths=step.totals, **options)
        return out, cache

    def as_read(self, k, v, step: Step, rule: AttentionRule) -> tuple[jax.Array, jax.Array]:
        return as_read(self.store, k, v, step, rule)

    def append(self, k, v, step: Step, rule: AttentionRule, layer) -> DenseCache:
        k = to_store(self.store, k, step, rule)
        return DenseCache(self.store.append(k, v, layer, step.starts, step.counts))

    def commit(self, starts, path, counts) -> DenseCache:
        return DenseCache(self.store.move(starts, path, counts))

    def map_rows(self, change) -> DenseCache:
        return dataclasses.replace(self, store=self.store.map_rows(change))

    @property
    def append_limit(self) -> int | None:
        return self.store.append_limit

    @property
    def capacity(self) -> int | None:
        return self.store.slots
