"""`streamed_matmul` by its definition."""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.quantized_matmul import reference
from pallas_kernels.stacks import of_layer


def streamed_matmul(
    x: jax.Array, weights: Sequence[jax.Array], scales: Sequence[jax.Array] | None, layer: Any, *, out_dtype: Any
) -> tuple[jax.Array, ...]:
    """`y_i = (x @ w_i[layer]) * s_i[layer]` for every i, summed in float32 (`precision=HIGHEST` for float32)."""
    found = []
    for i, w in enumerate(weights):
        s = None if scales is None else of_layer(scales[i], layer)
        found.append(reference.quantized_matmul(x, of_layer(w, layer), s, transpose=False, out_dtype=out_dtype))
    return tuple(found)
