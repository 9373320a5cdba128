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
    """heads: tokens drafted at most. blocks: residual blocks of each head. d_model: of the target's features."""

    d_model: int
    heads: int = 4
    blocks: int = 1

    def __post_init__(self):
        for name in ("d_model", "heads", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")


class MedusaHeads(nnx.Module):
    """Head i makes of the feature at t one whose logits, by the target's own head, predict token t + 2 + i.

    A block is `x + silu(W x + b)` (section 2.1.1). The paper trains a copy of the target's head for each; here all
    share the target's, which is most of the weights.
    """

    def __init__(self, spec: MedusaSpec, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.spec = spec

        def block() -> Linear:
            d = spec.d_model
            return Linear(d, d, axes=(None, "embed"), bias=True, rngs=rngs, dtype=dtype, quantizable=True)

        self.heads = nnx.List([nnx.List([block() for _ in range(spec.blocks)]) for _ in range(spec.heads)])

    @property
    def dtype(self) -> jnp.dtype:
        """That of what is not quantised."""
        bias = self.heads[0][0].bias
        assert bias is not None
        return bias[...].dtype

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Features `[..., d_model]` -> `[heads, ..., d_model]`."""
        return jnp.stack([self._head(blocks, hidden) for blocks in self.heads])

    def _head(self, blocks, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = x + jax.nn.silu(block(x, out=jnp.float32)).astype(x.dtype)
        return x
