"""Look-ahead tokens: learned embeddings behind a text, at which the target says what comes later (PaSS: Monea et
al. 2023, arXiv:2311.13581)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from jaxinf.layers.parameters import normal
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class AheadSpec:
    """d_model: of the target's embeddings. tokens: L, how many there are."""

    d_model: int
    tokens: int = 3

    def __post_init__(self):
        for name in ("d_model", "tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")


class AheadTokens(nnx.Module):
    """`embed [L, d_model]`: what the target's first layer is given at the i-th place after the latest token, where
    its output then predicts the token at place i + 1 (section 3.1). All else is the target's."""

    def __init__(self, spec: AheadSpec, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.spec = spec
        self.embed = normal(rngs, (spec.tokens, spec.d_model), (None, "embed"), dtype, std=spec.d_model**-0.5)

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed[...].dtype
