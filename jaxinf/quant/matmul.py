"""Products with matrices that may be quantised, and may lie in a stack of layers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.core.stacked import unstack
from jaxinf.quant.estimator import straight_through
from jaxinf.quant.fake import FakeQuant
from jaxinf.quant.qtensor import FIELDS, QTensor
from pallas_kernels import grouped_matmul, quantized_matmul
from pallas_kernels.stacks import of_layer
from sharding.collectives import index, size


def matmul(x: jax.Array, w: Any, *, out_dtype: Any, split: tuple[str, ...] = ()) -> jax.Array:
    """`x [..., K] @ w [K, N]` -> `[..., N]` in `out_dtype`.

    Args:
      w: an array, a `QTensor` or a `FakeQuant`, or any with `jaxinf.core.stacked.Stacked` for arrays.
      split: axes of the mesh over which K is split: then x, and w but for outliers, are this chip's part, and the
        result is its summand. Inputs rounded to bytes have a scale a token and chip.
    """
    if isinstance(w, FakeQuant):
        return straight_through(partial(matmul, out_dtype=out_dtype, split=split), x, w)
    if not isinstance(w, QTensor):
        kernel, layer = unstack(w)
        return quantized_matmul(x, kernel, layer=layer, out_dtype=out_dtype)
    if w.order is not None:
        x = jnp.take(x, _whole(w.order), axis=-1)
    wide = None
    if w.rows is not None:
        x, wide = _outliers(x, _whole(w.rows), _whole(w.outliers), split)
    (values, layer), (scales, _), (codebook, _) = (unstack(of) for of in (w.values, w.scales, w.codebook))
    if scales.dtype != jnp.float32:
        values, scales, codebook = (of_layer(of, layer) for of in (values, scales, codebook))
        scales, layer = scales.astype(jnp.float32), None
    plain = w.zeros is None and wide is None
    y = quantized_matmul(
        x,
        values,
        scales,
        codebook,
        layer=layer,
        activations=w.activations,
        out_dtype=out_dtype if plain else jnp.float32,
    )
    if w.zeros is not None:
        y = y - _of_zeros(x, _whole(w.zeros) * _by_group(_whole(w.scales), _whole(w.zeros)), w.activations)
    if wide is not None:
        y = y + wide
    return y.astype(out_dtype)


def grouped(rows: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    """Rows `[M, K]` sorted by group, each times the matrix of its group, of `w [E, K, N]` -> `[M, N]`.

    Args:
      w: as for `matmul`. What the kernel does not read as it is stored (all but int8 and int4 without zeros) is
        widened first, all E matrices of a layer.
      sizes: int32 `[E]`, rows of each group.
    """
    if isinstance(w, FakeQuant):
        return straight_through(grouped, rows, w, sizes)
    if not isinstance(w, QTensor):
        matrices, layer = unstack(w)
        return grouped_matmul(rows, matrices, sizes, layer=layer)
    values, layer = unstack(w.values)
    scales, _ = unstack(w.scales)
    if w.activations is not None:
        rows = _rounded(rows)
    if values.dtype in (jnp.int8, jnp.int4) and all(getattr(w, name) is None for name in FIELDS[2:]):
        return grouped_matmul(rows, values, sizes, layer=layer, rhs_scale=scales)
    own = dataclasses.replace(w, **{name: _whole(getattr(w, name)) for name in FIELDS})
    return grouped_matmul(rows, own.dequantize(rows.dtype), sizes)


def _whole(value: Any) -> Any:
    """A layer's array, cut out where it lies in a stack."""
    array, layer = unstack(value)
    return of_layer(array, layer)


def _by_group(scales: jax.Array, zeros: jax.Array) -> jax.Array:
    return scales.astype(jnp.float32).reshape(zeros.shape)


def _rounded(x: jax.Array) -> jax.Array:
    """x as bytes with a scale a row hold it, in its own dtype."""
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1, scale)
    return (jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -127, 127) * scale).astype(x.dtype)


def _of_zeros(x: jax.Array, zeros: jax.Array, activations: str | None) -> jax.Array:
    """What zeros `[G, N]`, scales included, take off a product: the sums of x by group, times them."""
    x = _rounded(x.astype(jnp.float32)) if activations else x.astype(jnp.float32)
    sums = jnp.sum(x.reshape(*x.shape[:-1], zeros.shape[0], -1), axis=-1)
    return jnp.matmul(sums, zeros, precision="highest")


def _outliers(x: jax.Array, rows: jax.Array, wide: jax.Array, split: tuple[str, ...]) -> tuple[Any, jax.Array]:
    """x without the channels of outliers, and their product in float32."""
    inner = x.shape[-1]
    if split and size(*split) > 1:
        rows = rows - index(*split) * inner
    here = (rows >= 0) & (rows < inner)
    at = jnp.where(here, rows, inner)
    picked = jnp.where(here, jnp.take(x, rows, axis=-1, mode="clip"), 0)
    rest = x * jnp.ones(inner, x.dtype).at[at].set(0, mode="drop")
    precision = "highest" if x.dtype == jnp.float32 else None
    wide = wide.astype(x.dtype)
    return rest, jnp.matmul(picked, wide, precision=precision, preferred_element_type=jnp.float32)
