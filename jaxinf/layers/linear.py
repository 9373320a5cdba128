"""Matrix products with stored weights, and the token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.layers.parameters import constant, normal
from jaxinf.quant import matmul
from pallas_kernels import quantized_matmul
from pallas_kernels.stored import from_bits, to_bits
from sharding.collectives import index, psum, size
from sharding.rules import RULES


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, with `kernel [in, out]`; products accumulate in float32.

    On a mesh that splits the kernel's columns, each chip has its columns of y; where it splits the rows, and the
    last axis of x, the chips' products are added (Shoeybi et al. 2019, Megatron-LM, sec. 3).
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        axes: tuple[str | None, str | None],
        bias=False,
        rngs,
        dtype,
        quantizable=False,
    ):
        self.kernel = normal(rngs, (n_in, n_out), axes, dtype, std=n_in**-0.5, quantizable=quantizable)
        self.bias = constant(0.0, (n_out,), axes[1:], dtype) if bias else None
        self._summed = RULES[axes[0]] if axes[0] is not None else ()

    def __call__(self, x: jax.Array, *, out=None, whole: bool = True) -> jax.Array:
        """`x [..., in]` -> `[..., out]` in dtype `out` (default: x's); this chip's summand of it if not `whole`."""
        out = x.dtype if out is None else out
        y = matmul(x, self.kernel.get_value(), out_dtype=jnp.float32, split=self._summed)
        if not whole:
            return y.astype(out)
        if size(*self._summed) > 1:
            # In the dtype of the result: half the bytes on the wires.
            y = psum(y.astype(out), *self._summed).astype(jnp.float32)
        return self.biased(y).astype(out)

    def biased(self, y: jax.Array) -> jax.Array:
        """y, and the bias if there is one; that sum in float32."""
        return y if self.bias is None else y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """A table `[entries, d]`, read by row; tied heads multiply by its transpose.

    On a mesh that splits the entries a chip looks up those that it has, and the chips' rows are added.
    """

    def __init__(self, entries: int, d: int, *, axes: tuple[str | None, str | None], rngs, dtype):
        self.table = normal(rngs, (entries, d), axes, dtype, std=d**-0.5)
        self._split = RULES[axes[0]] if axes[0] is not None else ()

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` int `[...]` -> `[..., d]`."""
        table = self.table[...]
        if size(*self._split) == 1:
            return _rows(table, ids)
        own = ids - index(*self._split) * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.where(here[..., None], _rows(table, jnp.clip(own, 0, table.shape[0] - 1)), 0)
        return psum(rows, *self._split)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x [..., d]` -> float32 `[..., entries]`: of those that this chip has."""
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
