"""The cache of a whole model: each layer's, and how many tokens each row holds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax

from jaxinf.cache.base import LayerCache
from pallas_kernels.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """`layers[i][j]`: the cache of segment i's block j. `lengths` int32 `[B]`: tokens that each row holds."""

    layers: tuple[tuple[LayerCache, ...], ...]
    lengths: jax.Array

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.layers))

    @property
    def capacity(self) -> int | None:
        """Tokens that a row can hold; None where every layer forgets."""
        limits = [c.capacity for segment in self.layers for c in segment if c.capacity is not None]
        return min(limits, default=None)

    @property
    def append_limit(self) -> int | None:
        """How many of the latest tokens `roll_back` can take back; None: all of them."""
        limits = [c.append_limit for segment in self.layers for c in segment if c.append_limit is not None]
        return min(limits, default=None)

    def roll_back(self, lengths: jax.Array) -> Cache:
        """The cache with each row cut to `lengths` int32 `[B]`, at most what it holds.

        Costs nothing: what lies past a row's length is never read. A window has forgotten what left it, so no
        more than `append_limit` tokens may be taken back there; under `jit` the caller sees to that.
        """
        if lengths.shape != self.lengths.shape:
            raise InputError(f"lengths.shape={lengths.shape} must be {self.lengths.shape}")
        return dataclasses.replace(self, lengths=lengths)

    def commit(self, path: jax.Array, counts: jax.Array) -> Cache:
        """The cache after a pass over trees (`Step.tree`), of which a branch stays in each row.

        Args:
          path: int32 `[B, P]`, columns of the pass from the root down, rising.
          counts: int32 `[B]`, how many of them stay, 0 to P. The lengths are still those before the pass.
        """
        layers = tuple(tuple(c.commit(self.lengths, path, counts) for c in segment) for segment in self.layers)
        return Cache(layers, self.lengths + counts)

    def take(self, rows: jax.Array) -> Cache:
        """The cache of the rows `rows` int32 `[M]`, in that order, repeats allowed; a copy."""
        layers = tuple(tuple(c.take(rows) for c in segment) for segment in self.layers)
        return Cache(layers, self.lengths[rows])
