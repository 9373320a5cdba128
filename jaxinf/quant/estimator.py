"""Training with rounding: the straight-through estimator.

A product with a matrix that is to be stored rounded, and perhaps with rounded inputs, is computed as it will be
once the model is finished; its gradients are those of a product of the rounded numbers in which rounding has
derivative 1 (Bengio et al. 2013, arXiv:1308.3432; for weights Jacob et al. 2017, arXiv:1712.05877):

    y  = q(x) q(w)        dx = dy q(w)^T        dw = q(x)^T dy

With the format "ternary" and activations "int8" that is the layer of BitNet b1.58 (Ma et al. 2024,
arXiv:2402.17764): q(w) = g clip(round(w / g), -1, 1) with g = mean |w|; q(x) has 8 bits and a scale a token
(Wang et al. 2023, arXiv:2310.11453, without its zero mean).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinf.core.stacked import unstack
from jaxinf.quant.fake import FakeQuant
from jaxinf.quant.formats import FORMATS, format_of
from jaxinf.quant.qtensor import QTensor
from pallas_kernels.errors import InputError
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.stacks import of_layer
from sharding.collectives import all_gather, index, size
from sharding.rules import RULES

TRAINABLE = tuple(name for name in FORMATS if not name.startswith("kmeans"))
"""Formats to train with: a codebook would be searched anew at every step."""
BYTE_FORMATS = ("int8", "int4", "ternary")
"""Those whose codes multiply bytes."""


def fake_quant(
    w: Any,
    name: str,
    group: int | None = None,
    activations: Literal["int8"] | None = None,
    axes: Sequence[str | None] = (None, None),
) -> FakeQuant:
    """A matrix `[..., K, N]`, abstract or not, to be trained for a format of `TRAINABLE`.

    Args:
      group: rows that share a scale; None: the format's own.
      axes: logical names of the matrix's axes, the last two of which are K and N.

    Raises:
      InputError: another format, a group that does not divide K, or activations that do not go with the format.
    """
    if name not in TRAINABLE:
        raise InputError(f"format {name!r} cannot be trained: choose one of {', '.join(TRAINABLE)}")
    if activations not in (None, "int8"):
        raise InputError(f"{activations=} must be 'int8', or None to keep inputs as they are")
    if activations and name not in BYTE_FORMATS:
        raise InputError(f"{activations=} needs one of {', '.join(BYTE_FORMATS)}, not {name}: leave it out")
    rows, columns = axes[-2:]
    return FakeQuant(w, name, format_of(name).group(w.shape[-2], group), activations, (rows, columns))


def rounded(w: FakeQuant) -> QTensor:
    """The matrix as it will be stored; on a mesh this chip's part of it."""
    format, values = format_of(w.format), w.values
    own_rows, own_columns = values.shape[-2:]
    rows, columns = (() if name is None else RULES[name] for name in w.axes)
    # A scale is that of rows, or of a whole matrix, which may lie on several chips.
    rows = rows if own_rows % w.group else ()
    columns = () if format.grouped else columns
    q = format(_gathered(_gathered(values, rows, -2), columns, -1), w.group)
    if size(*rows) > 1:
        if q.groups > 1:
            unit = math.gcd(w.group, own_rows)
            scales = jnp.repeat(q.scales, w.group // unit, axis=-2)
            q = dataclasses.replace(q, scales=_part(scales, rows, -2, own_rows // unit))
        q = dataclasses.replace(q, values=_part(q.values, rows, -2, own_rows))
    if size(*columns) > 1:
        values, scales = (_part(of, columns, -1, own_columns) for of in (q.values, q.scales))
        q = dataclasses.replace(q, values=values, scales=scales)
    return dataclasses.replace(q, activations=w.activations)


def _gathered(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    for axis in reversed(axes):
        x = all_gather(x, axis, x.ndim + dim)
    return x


def _part(x: jax.Array, axes: Sequence[str], dim: int, each: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index(*axes) * each, each, x.ndim + dim)


def straight_through(product: Callable[..., jax.Array], x: jax.Array, w: FakeQuant, *rest: jax.Array) -> jax.Array:
    """`product(x, w, *rest)`, which takes a `QTensor` or an array for w; differentiable in x and w."""
    values, layer = unstack(w.values)
    return _through(product, dataclasses.replace(w, values=None), x, of_layer(values, layer), rest)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through(product, how: FakeQuant, x, values, rest):
    return product(x, rounded(dataclasses.replace(how, values=values)), *rest)


def _forward(product, how, x, values, rest):
    q = rounded(dataclasses.replace(how, values=values))
    return product(x, q, *rest), (x, q, jnp.zeros(0, values.dtype), rest)


def _backward(product, how, saved, dy):
    x, q, like, rest = saved
    if how.activations:
        codes, scale = quantize_rows(x)
        x = (codes * scale).astype(x.dtype)
    _, pull = jax.vjp(lambda x, w: product(x, w, *rest), x, q.dequantize(like.dtype))
    return *pull(dy), jax.tree.map(lambda _: None, rest)


_through.defvjp(_forward, _backward)
