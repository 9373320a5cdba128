"""A quantised matrix, or a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """Stands where a matrix `[..., K, N]` did: `values * scales[..., None, :]`.

    values: int8 `[..., K, N]`, from -127 to 127. scales: float32 `[..., N]`, one a column, none negative; leading
    axes as those of `values`, so that one slice of both is a quantised matrix again.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scales[..., None, :]).astype(dtype)


def round_to_nearest(w: jax.Array) -> QTensor:
    """int8 with one scale a column: q = round(w / s), s = max |w| / 127 over the column.

    The largest entry of a column is kept exactly up to rounding, every other to half a scale.
    """
    wide = w.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-2) / 127
    safe = jnp.where(scales > 0, scales, 1.0)
    values = jnp.clip(jnp.round(wide / safe[..., None, :]), -127, 127)
    return QTensor(values.astype(jnp.int8), scales)


def stored(value: Any) -> tuple[Any, Any]:
    """`(values, scales)` of a matrix that may be quantised; scales are None if it is not."""
    return (value.values, value.scales) if isinstance(value, QTensor) else (value, None)


def parts(value: Any, axes: Sequence[str | None]) -> list[tuple[str | None, Any, tuple[str | None, ...]]]:
    """The plain arrays of a parameter, each with its field's name (None: the value itself) and its axes' names."""
    if isinstance(value, QTensor):
        return [("values", value.values, tuple(axes)), ("scales", value.scales, (*axes[:-2], axes[-1]))]
    return [(None, value, tuple(axes))]
