"""Weights that travel while chips add: for passes of few tokens, whose time is that of weights on their way.

A layer's products end in sums over the chips of `tensor`, during which nothing else would run. Meanwhile the first
tiles of the weights that come next can go from HBM to VMEM:

    y = this chip's summand of a last product
    fetch the first tiles of the next weights        begun, not awaited
    x = x + (sum of y over the chips)                beside it
    the next products                                wait for those tiles, and stream the others

The sum at a layer's end is left to the next layer, which knows the weights that come next (`Unsummed`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.core.stacked import unstack
from jaxinf.layers.linear import Linear
from jaxinf.quant import QTensor
from pallas_kernels import chips
from pallas_kernels.dispatch import Implementation
from pallas_kernels.streamed_matmul import Fetched, fetch, streamed_matmul
from pallas_kernels.streamed_matmul.blocks import MOST_ROWS
from sharding.collectives import psum, size

_IMPLEMENTATION: Implementation | None = None
"""Of the kernels; tests interpret them."""
_FETCHING = ("v5e", "v6e")
"""Chips of one core, as the kernels are for, on which sums hold the core up."""
_HOLDING = ("v5e",)
"""Those for which the compiler holds tiles in VMEM while other kernels run; for v6e it crashes (libtpu 0.0.42)."""
_HOP = 1e-6
"""Seconds from a chip to the next (jax-ml.github.io/scaling-book/tpus)."""
_PER_BYTE = 16
"""Bytes that HBM gives in the time that a byte of a large sum takes: 14 to 18 on all chips."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unsummed:
    """A residual stream `x + (sum of part over the chips of tensor)`, both `[B, T, d]`."""

    x: jax.Array
    part: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> Unsummed:
        """A stream to which nothing is to be added."""
        return cls(x, jnp.zeros_like(x))

    def settle(
        self, following: Sequence[Linear] = (), later: Sequence[tuple[Linear, float]] = ()
    ) -> tuple[jax.Array, Fetched | None, list[Fetched | None]]:
        """The sum `[B, T, d]`, and the first tiles of weights that begin to travel before it.

        following: products that come next, `together`; as many bytes of them as arrive during the sum.
        later: products that come after others, which leave HBM idle, and how much of each weight (1: all of it)
          is to come before, if so much may stay in VMEM until then.
        """
        part, found, vmem = self.part, [], chips.current().vmem
        first, part = _fetch(following, part, min(_meanwhile(part), vmem // 4))
        room = vmem // 8 if chips.current().name in _HOLDING else 0
        for product, share in later:
            fetched, part = _fetch((product,), part, min(room, int(share * _bytes(product))))
            found.append(fetched)
            room -= 0 if fetched is None else sum(b.nbytes for b in fetched.buffers)
        return self.x + psum(part, "tensor"), first, found


def pays(products: Sequence[Linear], rows: int) -> bool:
    """Whether sums over chips are to be left to what follows, in a pass of so many rows of activations.

    products: all that the sums and the weights to be fetched belong to.
    """
    here = (chips.platform() == "tpu" and chips.current().name in _FETCHING) or _IMPLEMENTATION is not None
    few = rows <= MOST_ROWS and size("tensor") > 1 and here
    return few and all(_plain(p.kernel.get_value()) for p in products)


def together(
    x: jax.Array, products: Sequence[Linear], fetched: Fetched | None, *, whole: bool = True
) -> list[jax.Array]:
    """What each of the products gives for `x [B, T, in]`: of one kernel where their first tiles were fetched.

    whole: as of `Linear`; what was fetched is for products that need no sum, or none yet.
    """
    if fetched is None:
        return [product(x, whole=whole) for product in products]
    weights, scales, layer = _stored(products)
    found = streamed_matmul(
        x.reshape(-1, x.shape[-1]),
        weights,
        scales,
        layer=layer,
        fetched=fetched,
        out_dtype=_out(products, x.dtype),
        implementation=_IMPLEMENTATION,
    )
    pairs = zip(products, found, strict=True)
    return [p.biased(y).astype(x.dtype).reshape(*x.shape[:-1], -1) for p, y in pairs]


def _plain(kernel: object) -> bool:
    """Whether a kernel is read as it is stored by `streamed_matmul`: bytes with a scale a column."""
    if not isinstance(kernel, QTensor) or kernel.activations is not None:
        return False
    values, scales = unstack(kernel.values)[0], unstack(kernel.scales)[0]
    rest = (kernel.zeros, kernel.codebook, kernel.outliers, kernel.order)
    bytes_by_column = values.dtype == jnp.int8 and scales.dtype == jnp.float32 and scales.ndim == values.ndim - 1
    return bytes_by_column and all(field is None for field in rest)


def _stored(products: Sequence[Linear]) -> tuple[list[jax.Array], list[jax.Array], jax.Array | None]:
    """Weights and scales, and the layer of them that is meant where they are stacked."""
    kernels = [p.kernel.get_value() for p in products]
    layer = unstack(kernels[0].values)[1]
    return [unstack(k.values)[0] for k in kernels], [unstack(k.scales)[0] for k in kernels], layer


def _bytes(product: Linear) -> int:
    """Of one layer's weight."""
    values, layer = unstack(product.kernel.get_value().values)
    return values.nbytes if layer is None else values.nbytes // values.shape[0]


def _out(products: Sequence[Linear], dtype: jnp.dtype) -> jnp.dtype:
    """Of the products: float32 where a bias is still to be added."""
    return jnp.dtype(dtype if all(p.bias is None for p in products) else jnp.float32)


def _fetch(products: Sequence[Linear], part: jax.Array, size: int) -> tuple[Fetched | None, jax.Array]:
    if not products:
        return None, part
    weights, _, layer = _stored(products)
    return fetch(
        weights,
        part,
        rows=math.prod(part.shape[:-1]),
        size=size,
        layer=layer,
        out_dtype=_out(products, part.dtype),
        implementation=_IMPLEMENTATION,
    )


def _meanwhile(part: jax.Array) -> int:
    """Bytes that arrive during a sum, by the formulas of textbooks for a square of chips.

    It goes both ways over the chips of a column and of a row, a hop each, or takes as long as its bytes do.
    """
    chip = chips.current()
    hops = 4 * (math.sqrt(size("tensor")) - 1)
    return int(max(hops * _HOP * chip.bandwidth / chip.cores, _PER_BYTE * part.nbytes))
