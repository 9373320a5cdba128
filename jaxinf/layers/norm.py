"""RMSNorm and LayerNorm, in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxinf.layers.parameters import constant
from sharding.collectives import psum, size
from sharding.rules import RULES


@dataclass(frozen=True)
class NormSpec:
    """Normalises over the last axis. `eps` is added to the mean square (or the variance)."""

    eps: float = 1e-6

    def build(self, shape: int | Sequence[int], *, dtype, axes: Sequence[str | None] | None = None) -> nnx.Module:
        """The module, with parameters of `shape` (the last axis is the one normalised over)."""
        raise NotImplementedError


@dataclass(frozen=True)
class RMSNormSpec(NormSpec):
    """y = x / sqrt(mean(x^2) + eps) * (offset + scale)  (Zhang & Sennrich 2019).

    Gemma stores `scale` about zero: its `offset` is 1.
    """

    offset: float = 0.0

    def build(self, shape, *, dtype, axes=None):
        return RMSNorm(self, shape, dtype=dtype, axes=axes)


@dataclass(frozen=True)
class LayerNormSpec(NormSpec):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias  (Ba et al. 2016)."""

    bias: bool = True

    def build(self, shape, *, dtype, axes=None):
        return LayerNorm(self, shape, dtype=dtype, axes=axes)


class RMSNorm(nnx.Module):
    def __init__(self, spec: RMSNormSpec, shape, *, dtype, axes=None):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.spec = spec
        self.scale = constant(1.0 - spec.offset, shape, axes or (None,) * len(shape), dtype)
        self._over = _over(axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * lax.rsqrt(_mean(x32 * x32, self._over) + self.spec.eps)
        return (y * (self.scale[...].astype(jnp.float32) + self.spec.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, spec: LayerNormSpec, shape, *, dtype, axes=None):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.spec = spec
        axes = axes or (None,) * len(shape)
        self.scale = constant(1.0, shape, axes, dtype)
        self.bias = constant(0.0, shape, axes, dtype) if spec.bias else None
        self._over = _over(axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - _mean(x32, self._over)
        y = x32 * lax.rsqrt(_mean(x32 * x32, self._over) + self.spec.eps)
        y = y * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def _over(axes: Sequence[str | None] | None) -> tuple[str, ...]:
    """Mesh axes that split what is normalised over."""
    return RULES[axes[-1]] if axes and axes[-1] is not None else ()


def _mean(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """The mean over the last axis, of which each chip has an equal part."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    chips = size(*over)
    return mean if chips == 1 else psum(mean, *over) / chips
