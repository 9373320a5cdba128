"""Matrix products with stored weights, and the token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.core import dot
from jaxinf.layers.parameters import constant, normal


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, with `kernel [in, out]`; products accumulate in float32."""

    def __init__(self, n_in: int, n_out: int, *, axes: tuple[str | None, str | None], bias=False, rngs, dtype):
        self.kernel = normal(rngs, (n_in, n_out), axes, dtype, std=n_in**-0.5)
        self.bias = constant(0.0, (n_out,), axes[1:], dtype) if bias else None

    def __call__(self, x: jax.Array, *, out=None) -> jax.Array:
        """`x [..., in]` -> `[..., out]` in dtype `out` (default: x's)."""
        y = dot(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype if out is None else out)


class Embedding(nnx.Module):
    """A table `[entries, d]`, read by row; tied heads multiply by its transpose."""

    def __init__(self, entries: int, d: int, *, axes: tuple[str | None, str | None], rngs, dtype):
        self.table = normal(rngs, (entries, d), axes, dtype, std=d**-0.5)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` int `[...]` -> `[..., d]`."""
        return jnp.take(self.table[...], ids, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """`x [..., d]` -> float32 `[..., entries]`."""
        return dot(x, self.table[...], transpose=True)
