"""`streamed_matmul` in plain XLA: one product after the other."""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.quantized_matmul import quantized_matmul


def streamed_matmul(
    x: jax.Array, weights: Sequence[jax.Array], scales: Sequence[jax.Array] | None, layer: Any, *, out_dtype: Any
) -> tuple[jax.Array, ...]:
    """`x [M, K]`, each of weights `[L, K, N]`, each of scales float32 `[L, N]`; each result `[M, N]`."""
    each = [None] * len(weights) if scales is None else scales
    return tuple(
        quantized_matmul(x, w, s, layer=layer, out_dtype=out_dtype, implementation="xla")
        for w, s in zip(weights, each, strict=True)
    )
