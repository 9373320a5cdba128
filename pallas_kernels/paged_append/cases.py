"""Named calls of `paged_append`, for benchmarks and compile tests: new tokens of `ragged_paged_attention`."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.named import Call, Work
from pallas_kernels.ragged_paged_attention import cases


@dataclass(frozen=True)
class Case:
    """A call. `paged` says pages and rows; what it says of queries counts for nothing."""

    name: str
    paged: cases.Case

    @property
    def work(self) -> Work:
        """New keys and values read, and written as they are stored, with their scales."""
        p = self.paged
        numbers = p.head_dim + (0 if p.latent else p.value_dim)
        scales = (1 if p.latent else 2) * 4 if p.cache == "int8" else 0
        stored = p.page_width * jnp.dtype(p.cache).itemsize + scales
        tokens = int(p.q_starts[-1]) * p.kv_heads
        return Work(0.0, float(tokens * (numbers * jnp.dtype(p.dtype).itemsize + stored)), p.dtype)

    def call(self, implementation: Any = "pallas", blocks: None = None) -> Call:
        """Into the last layer. There are no blocks to choose."""
        from pallas_kernels.paged_append import paged_append

        p = self.paged
        _, pages, scales = p.shapes
        tokens = int(p.q_starts[-1])
        layer = None if p.layers is None else p.layers - 1

        def fn(table, lengths, starts, pages, k, v=None, scales=None):
            options: Any = dict(layer=layer, page_scales=scales, implementation=implementation)
            return paged_append(pages, k, v, table, lengths, starts, **options)

        given = [
            jax.ShapeDtypeStruct(pages, jnp.dtype(p.cache)),
            jax.ShapeDtypeStruct((tokens, p.kv_heads, p.head_dim), jnp.dtype(p.dtype)),
            None if p.latent else jax.ShapeDtypeStruct((tokens, p.kv_heads, p.value_dim), jnp.dtype(p.dtype)),
            None if scales is None else jax.ShapeDtypeStruct(scales, jnp.float32),
        ]
        donated = (3,) if scales is None else (3, 6)
        return Call(fn, (p.page_table(), p.kv_lengths, p.q_starts, *given), self.work, donated)


MODELS = tuple(
    Case(
        case.name,
        replace(case, name="", heads=case.kv_heads, options=MappingProxyType({}), arrays=MappingProxyType({})),
    )
    for case in cases.MODELS
)
