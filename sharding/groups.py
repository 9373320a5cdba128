"""Collectives within groups of neighbours along one mesh axis: chips that share a key head."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from sharding.collectives import index, size


@dataclass(frozen=True)
class Group:
    """`size` neighbours along `axis`; with one there is nothing to do. Dimensions count from 0."""

    size: int
    axis: str = "tensor"

    @property
    def index(self) -> jax.Array:
        """int32 scalar: this chip's place in its group."""
        return index(self.axis) % self.size

    @property
    def _groups(self) -> list[list[int]]:
        return [list(range(i, i + self.size)) for i in range(0, size(self.axis), self.size)]

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else jax.lax.pmax(x, self.axis, axis_index_groups=self._groups)

    def gather(self, x: jax.Array, dim: int) -> jax.Array:
        """The chips' arrays side by side along `dim`."""
        if self.size == 1:
            return x
        return jax.lax.all_gather(x, self.axis, axis_index_groups=self._groups, axis=dim, tiled=True)

    def scatter(self, x: jax.Array, dim: int) -> jax.Array:
        """The sum over the chips, of which each keeps its part along `dim`."""
        if self.size == 1:
            return x
        return jax.lax.psum_scatter(x, self.axis, axis_index_groups=self._groups, scatter_dimension=dim, tiled=True)

    def exchange(self, x: jax.Array, split: int, concat: int) -> jax.Array:
        """Part i along `split` goes to chip i; what arrives lies along `concat` in the order of chips."""
        if self.size == 1:
            return x
        return jax.lax.all_to_all(x, self.axis, split, concat, axis_index_groups=self._groups, tiled=True)

    def rotate(self, x: jax.Array) -> jax.Array:
        """What the chip before this one gave; the first takes from the last."""
        if self.size == 1:
            return x
        pairs = [(a, b) for group in self._groups for a, b in zip(group, group[1:] + group[:1], strict=True)]
        return jax.lax.ppermute(x, self.axis, pairs)

    def part(self, x: jax.Array, dim: int) -> jax.Array:
        """This chip's part along `dim` of an array that all have whole."""
        if self.size == 1:
            return x
        each = x.shape[dim] // self.size
        return jax.lax.dynamic_slice_in_dim(x, self.index * each, each, dim)
