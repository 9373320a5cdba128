"""Matrix products with stored weights, and the token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.layers.parameters import constant, normal
from pallas_kernels import quantized_matmul
from pallas_kernels.stored import from_bits, to_bits


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, with `kernel [in, out]`; products accumulate in float32."""

    def __init__(self, n_in: int, n_out: int, *, axes: tuple[str | None, str | None], bias=False, rngs, dtype):
        self.kernel = normal(rngs, (n_in, n_out), axes, dtype, std=n_in**-0.5)
        self.bias = constant(0.0, (n_out,), axes[1:], dtype) if bias else None

    def __call__(self, x: jax.Array, *, out=None) -> jax.Array:
        """`x [..., in]` -> `[..., out]` in dtype `out` (default: x's)."""
        y = quantized_matmul(x, self.kernel[...], out_dtype=jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype if out is None else out)


class Embedding(nnx.Module):
    """A table `[entries, d]`, read by row; tied heads multiply by its transpose."""

    def __init__(self, entries: int, d: int, *, axes: tuple[str | None, str | None], rngs, dtype):
        self.table = normal(rngs, (entries, d), axes, dtype, std=d**-0.5)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` int `[...]` -> `[..., d]`."""
        return _rows(self.table[...], ids)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x [..., d]` -> float32 `[..., entries]`."""
        return quantized_matmul(x, self.table[...], transpose=True, out_dtype=jnp.float32)


@jax.custom_vjp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(table, ids, cpu=_rows_on_cpu, default=_take)


def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0, mode="clip")


def _rows_on_cpu(table: jax.Array, ids: jax.Array) -> jax.Array:
    # As bits: of a 16-bit float table XLA's CPU compiler first turns every row into float32.
    return from_bits(_take(to_bits(table), ids), table.dtype)


def _rows_forward(table, ids):
    return _rows(table, ids), (ids, table.shape[0])


def _rows_backward(saved, gradient):
    ids, entries = saved
    zeros = jnp.zeros((entries, gradient.shape[-1]), jnp.float32)
    return zeros.at[ids].add(gradient.astype(jnp.float32)).astype(gradient.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
