"""The cache of a head that writes a tree, level after level."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache, DenseCache
from jaxinf.cache.base import AttentionRule, LayerCache, Step, to_store
from pallas_kernels.errors import UnsupportedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Growing(LayerCache):
    """A dense cache with the nodes of a tree behind each row's tokens, a level of them a pass.

    Unlike with `Step.tree`, nodes of earlier passes stay, and nodes of one level see those that they follow alone.

    starts: int32 `[B]`, tokens before the tree. sees: bool `[B, M, M]`: of M nodes, those of the pass the last,
    which sees which. written: static, nodes of earlier passes.
    """

    base: DenseCache
    starts: jax.Array
    sees: jax.Array
    written: int = dataclasses.field(default=0, metadata=dict(static=True))

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        q = rule.turn(q, step.positions)
        keys, store = to_store(self.base.store, k, step, rule), self.base.store
        store = store.append(keys, v, layer, self.starts + self.written, step.counts)
        # The kernel reads a square: nodes of earlier passes ask as well, and nobody listens.
        everyone = jnp.pad(q, ((0, 0), (0, 0), (self.written, 0), (0, 0)))
        options = dict(layer=layer, turn=rule.turn, ancestor_mask=self.sees, **rule.mask)
        out = store.decode(everyone, self.starts + everyone.shape[2], **options)
        return out[:, :, self.written :], dataclasses.replace(self, base=DenseCache(store))

    def commit(self, starts, path, counts):
        raise UnsupportedError("what a head made of drafted tokens is forgotten: roll its own cache back")

    def map_rows(self, change):
        return dataclasses.replace(
            self, base=self.base.map_rows(change), starts=change(self.starts, 0), sees=change(self.sees, 0)
        )

    @property
    def append_limit(self) -> int | None:
        return self.base.append_limit

    @property
    def capacity(self) -> int | None:
        return self.base.capacity


def growing(cache: Cache, sees: jax.Array, written: int) -> Cache:
    """The cache of a head for the next level. sees, written: of `Growing`."""
    (blocks,) = cache.layers
    layers = []
    for one in blocks:
        base = one.base if isinstance(one, Growing) else one
        if not isinstance(base, DenseCache):
            raise UnsupportedError("trees are drafted by heads whose layers see everything: take a chain instead")
        layers.append(Growing(base, cache.lengths, sees, written))
    return Cache((tuple(layers),), cache.lengths)


def grown(cache: Cache) -> Cache:
    """The cache as it was, its memory as it is now."""
    layers = tuple(one.base if isinstance(one, Growing) else one for one in cache.layers[0])
    return Cache((layers,), cache.lengths)
