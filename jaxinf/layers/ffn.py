"""Feed-forward layers and the activations inside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.layers.ahead import together
from jaxinf.layers.linear import Linear
from pallas_kernels.streamed_matmul import Fetched
from sharding.collectives import size

Nonlinearity = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True)
class ActivationSpec:
    """What stands between the projections of a feed-forward layer; computed in float32."""

    @property
    def gated(self) -> bool:
        """Whether there is a gate beside the up projection."""
        raise NotImplementedError

    def __call__(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(ActivationSpec):
    """f(up)."""

    function: Nonlinearity = "gelu"

    @property
    def gated(self) -> bool:
        return False

    def __call__(self, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        return _FUNCTIONS[self.function](up)


@dataclass(frozen=True)
class Gated(ActivationSpec):
    """f(gate) * up  (Shazeer 2020, GLU variants)."""

    function: Nonlinearity = "silu"

    @property
    def gated(self) -> bool:
        return True

    def __call__(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
        assert gate is not None
        return _FUNCTIONS[self.function](gate) * up


@dataclass(frozen=True)
class ClampedGated(ActivationSpec):
    """gate * sigmoid(alpha * gate) * (up + 1), gate clipped from above and up on both sides by `limit`
    (GPT-OSS model card, 2025)."""

    alpha: float = 1.702
    limit: float = 7.0

    @property
    def gated(self) -> bool:
        return True

    def __call__(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
        assert gate is not None
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1.0)


@dataclass(frozen=True)
class FFNSpec:
    """down(activation(up(x), gate(x))) with `width` hidden channels."""

    width: int
    activation: ActivationSpec = Gated()
    bias: bool = False

    def token_bytes(self, d_model: int) -> int:
        """About what a token takes on each chip: hidden channels, two in float32 and a narrow one, and its sum."""
        return 10 * self.width // size("tensor") + 6 * d_model

    def build(self, d_model: int, *, rngs: nnx.Rngs, dtype) -> FFN:
        return FFN(self, d_model, rngs=rngs, dtype=dtype)


class FFN(nnx.Module):
    def __init__(self, spec: FFNSpec, d_model: int, *, rngs: nnx.Rngs, dtype):
        self.spec = spec
        make: dict[str, Any] = dict(bias=spec.bias, rngs=rngs, dtype=dtype, quantizable=True)
        self.up = Linear(d_model, spec.width, axes=("embed", "ffn"), **make)
        self.gate = Linear(d_model, spec.width, axes=("embed", "ffn"), **make) if spec.activation.gated else None
        self.down = Linear(spec.width, d_model, axes=("ffn", "embed"), **make)

    def __call__(
        self,
        x: jax.Array,
        *,
        cached: bool = False,
        fetched: Sequence[Fetched | None] = (None, None),
        whole: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, d]` -> `([B, T, d], 0.0)`: the second is the balancing loss that a mixture would have.

        fetched: of the weights of `first` and of `down`, what is on its way. whole: the result is summed over
        chips; else it is this chip's summand.
        """
        up, *gate = (y.astype(jnp.float32) for y in together(x, self.first, fetched[0]))
        hidden = self.spec.activation(up, gate[0] if gate else None).astype(x.dtype)
        return together(hidden, (self.down,), fetched[1], whole=whole)[0], jnp.zeros((), jnp.float32)

    @property
    def first(self) -> tuple[Linear, ...]:
        """The products that meet x."""
        return (self.up,) if self.gate is None else (self.up, self.gate)
