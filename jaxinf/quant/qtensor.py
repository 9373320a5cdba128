"""A quantised matrix, or a stack of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinf.quant.fake import FakeQuant
from pallas_kernels.vmem import bits
from sharding.rules import GROUPS

Activations = Literal["int8"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """Stands where a matrix `w [..., K, N]`, of K input and N output channels, did; leading axes stack matrices.

    Its G groups are of K / G consecutive rows, each with one scale a column:

        w[k, n] = (values[k, n] - zeros[g, n]) * scales[g, n]        g = k // (K / G)
        w[k, n] = codebook[values[k, n]] * scales[g, n]              with a codebook

    and row `rows[m]` of w is `outliers[m]` besides.

    Every field has the same leading axes, so that one slice of all is a quantised matrix again; on a mesh each
    field is split where its axes are those of `values` (`parts`).

    Attributes:
      values: codes `[..., K, N]`: int8, int4, int2, float8_e4m3fn or float8_e5m2; with a codebook uint4 or uint8.
        Those of 4 and 2 bits lie several in a byte.
      scales: float32, bfloat16 or float8_e8m0fnu `[..., N]` (one group) or `[..., G, N]`; finite.
      zeros: float32 `[..., G, N]`, in units of codes; None: 0. Not beside a codebook.
      codebook: float32 `[..., entries]`; None: codes are numbers.
      outliers: floats `[..., M, N]`, rows kept wide (Dettmers et al. 2022, arXiv:2208.07339); values are 0 there.
      rows: int32 `[..., M]`, which rows they are, each once; -1: none.
      order: int32 `[..., K]`, a permutation: row k of all this belongs to input channel `order[k]`; None: k.
      activations: "int8": inputs are rounded to bytes with a scale a token before they meet `values` (the outliers'
        channels excepted); None: they are not.
    """

    values: Any
    scales: Any
    zeros: Any = None
    codebook: Any = None
    outliers: Any = None
    rows: Any = None
    order: Any = None
    activations: Activations | None = field(default=None, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def groups(self) -> int:
        return self.scales.shape[-2] if self.scales.ndim == self.ndim else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return nbytes(self)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """`[..., K, N]`: the matrix that it stands for."""
        if self.codebook is None:
            wide = self.values.astype(jnp.float32)
        else:
            lead = self.codebook.shape[:-1]
            codes = self.values.astype(jnp.int32).reshape(*lead, -1)
            wide = jnp.take_along_axis(self.codebook, codes, -1, mode="clip").reshape(self.shape)
        if self.zeros is not None:
            wide = wide - self._by_row(self.zeros)
        wide = wide * self._by_row(self.scales)
        if self.rows is not None:
            # An unused entry falls outside, where it is dropped.
            at = jnp.where(self.rows < 0, self.shape[-2], self.rows)
            wide = _each(lambda w, r, o: w.at[r].set(o, mode="drop"), wide, at, self.outliers.astype(jnp.float32))
        if self.order is not None:
            wide = _each(lambda w, o: jnp.zeros_like(w).at[o].set(w), wide, self.order)
        return wide.astype(dtype)

    def _by_row(self, of_group: jax.Array) -> jax.Array:
        of_group = of_group.astype(jnp.float32)
        if of_group.ndim < self.ndim:
            return of_group[..., None, :]
        return jnp.repeat(of_group, self.shape[-2] // of_group.shape[-2], axis=-2)


def _each(function, *arrays: jax.Array) -> jax.Array:
    """`function` of every matrix of a stack."""
    for _ in range(arrays[0].ndim - 2):
        function = jax.vmap(function)
    return function(*arrays)


FIELDS = tuple(f.name for f in fields(QTensor) if not f.metadata.get("static"))
"""Names of the arrays of a `QTensor`, in their order."""


def parts(value: Any, axes: Sequence[str | None]) -> Iterator[tuple[str | None, Any, tuple[str | None, ...]]]:
    """The plain arrays of a parameter, each with its field's name (None: the value itself) and its axes' names.

    `sharding.rules.GROUPS` before a name says that an axis counts groups of what the name splits.
    """
    if not isinstance(value, QTensor):
        yield None, value.values if isinstance(value, FakeQuant) else value, tuple(axes)
        return
    *lead, inner, columns = axes
    grouped = None if inner is None else GROUPS + inner
    named = dict(
        values=(inner, columns),
        scales=(grouped, columns) if len(value.scales.shape) == value.ndim else (columns,),
        zeros=(grouped, columns),
        codebook=(None,),
        # Rows are numbered in the whole matrix, so every chip has them all and takes its own.
        outliers=(None, columns),
        rows=(None,),
        order=(None,),
    )
    for name in FIELDS:
        array = getattr(value, name)
        if array is not None:
            yield name, array, (*lead, *named[name])


def nbytes(tree: Any) -> int:
    """Bytes that the arrays of a pytree take, sub-byte ones packed (numpy's `nbytes` counts a byte at least)."""
    return sum((math.prod(x.shape) * bits(jnp.dtype(x.dtype).name) + 7) // 8 for x in jax.tree.leaves(tree))
