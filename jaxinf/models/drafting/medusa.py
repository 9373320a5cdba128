"""Medusa: several tokens ahead from one feature (Cai et al. 2024, arXiv:2401.10774)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.layers import Linear
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class MedusaSpec:
    """heads: tokens drafted at most. blocks: residual blocks of each head. d_model: of the target's features.

    width: hidden channels of a block; None: one matrix a block, as in the paper.
    """

    d_model: int
    heads: int = 4
    blocks: int = 1
    width: int | None = None

    def __post_init__(self):
        for name in ("d_model", "heads", "blocks", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")


class Wide(nnx.Module):
    """`silu(x @ up + b) @ down`."""

    def __init__(self, d: int, width: int, **make):
        self.up = Linear(d, width, axes=(None, "embed"), bias=True, quantizable=True, **make)
        self.down = Linear(width, d, axes=(None, "embed"), quantizable=True, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.up(x, out=jnp.float32)).astype(x.dtype))


class MedusaHeads(nnx.Module):
    """Head i makes of the feature at t one whose logits, by the target's own head, predict token t + 2 + i.

    A block is `x + silu(W x + b)` (section 2.1.1), or `x + V silu(W x + b)` with a width. The paper trains a copy
    of the target's head for each; here all share the target's, which is most of the weights.
    """

    def __init__(self, spec: MedusaSpec, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.spec = spec

        def block() -> Linear | Wide:
            d = spec.d_model
            if spec.width is not None:
                return Wide(d, spec.width, rngs=rngs, dtype=dtype)
            return Linear(d, d, axes=(None, "embed"), bias=True, rngs=rngs, dtype=dtype, quantizable=True)

        self.heads = nnx.List([nnx.List([block() for _ in range(spec.blocks)]) for _ in range(spec.heads)])

    @property
    def dtype(self) -> jnp.dtype:
        """That of what is not quantised."""
        first = self.heads[0][0]
        bias = (first.up if isinstance(first, Wide) else first).bias
        assert bias is not None
        return bias[...].dtype

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Features `[..., d_model]` -> `[heads, ..., d_model]`."""
        return jnp.stack([self._head(blocks, hidden) for blocks in self.heads])

    def _head(self, blocks, x: jax.Array) -> jax.Array:
        for block in blocks:
            if isinstance(block, Wide):
                x = x + block(x)
            else:
                x = x + jax.nn.silu(block(x, out=jnp.float32)).astype(x.dtype)
        return x
