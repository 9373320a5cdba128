"""A matrix in training that is to be stored rounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuant:
    """Stands where a matrix `w [..., K, N]` does while a model learns to be stored narrower.

    Products see it as the `QTensor` that `jaxinf.quant.estimator.rounded` makes of it, their gradients reach
    `values` as if nothing had been rounded. Its one array is of the shape, and lies as, the matrix did.

    Attributes:
      values: the matrix, of 16 or 32 bits `[..., K, N]`; on a mesh this chip's part.
      format: name in `jaxinf.quant.FORMATS`.
      group: rows of a group, of the whole matrix.
      activations: "int8": inputs are rounded to bytes with a scale a token; None: they are not.
      axes: logical names of K and N, by which a mesh splits them.
    """

    values: Any
    format: str = field(metadata=dict(static=True))
    group: int = field(metadata=dict(static=True))
    activations: Literal["int8"] | None = field(default=None, metadata=dict(static=True))
    axes: tuple[str | None, str | None] = field(default=(None, None), metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)
