"""Named calls of `cache_append`: SMALL ones for the contract tests, MODELS for benchmarks."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_shapes import SHAPES
from pallas_kernels.cache_append.api import cache_append
from pallas_kernels.cache_append.blocks import Blocks
from pallas_kernels.named import Call, Work


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    name: str
    layers: int | None
    batch: int
    kv_heads: int
    slots: int
    head_dim: int
    tokens: int
    cache: str = "float32"
    new: str = "float32"
    ring: bool = False
    scaled: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of cache and new."""
        lead = () if self.layers is None else (self.layers,)
        return (
            (*lead, self.batch, self.kv_heads, self.slots, self.head_dim),
            (self.batch, self.kv_heads, self.tokens, self.head_dim),
        )

    def call(self, implementation: Any = "pallas", blocks: Blocks | None = None) -> Call:
        """Into the last layer, each row at another slot."""
        cache, new = self.shapes
        starts = (np.arange(self.batch) * 37 + self.slots // 2) % max(self.slots - self.tokens, 1)
        args = [
            jax.ShapeDtypeStruct(cache, self.cache),
            jax.ShapeDtypeStruct(new, self.new),
            starts.astype(np.int32),
        ]
        if self.scaled:
            args.append(jax.ShapeDtypeStruct(cache[:-1], jnp.float32))
        layer = None if self.layers is None else self.layers - 1

        def fn(cache, new, starts, scales=None):
            options: Any = dict(ring=self.ring, blocks=blocks, implementation=implementation)
            return cache_append(cache, new, layer, starts, scales=scales, **options)

        vectors = self.batch * self.kv_heads * self.tokens
        sizes = jnp.dtype(self.cache).itemsize + jnp.dtype(self.new).itemsize
        moved = vectors * (self.head_dim * sizes + (4 if self.scaled else 0))
        return Call(fn, tuple(args), Work(0.0, float(moved), self.cache), self.donated)

    @property
    def donated(self) -> tuple[int, ...]:
        """Arguments of the call that it writes in place."""
        return (0, 3) if self.scaled else (0,)


SMALL = (
    Case("one_token", 3, 3, 2, 7, 4, 1),
    Case("one_layer", None, 2, 2, 7, 4, 3),
    Case("chunk", 2, 3, 2, 9, 4, 4),
    Case("longer_than_the_cache", 2, 2, 1, 5, 4, 8),
    Case("ring_one_token", 2, 3, 2, 7, 4, 1, ring=True),
    Case("ring", 2, 3, 2, 7, 4, 4, ring=True),
    Case("ring_longer_than_the_cache", 2, 2, 1, 5, 4, 12, ring=True),
    Case("bfloat16", 2, 2, 1, 6, 4, 2, cache="bfloat16"),
    Case("bfloat16_bits", 2, 2, 1, 6, 4, 2, cache="uint16", ring=True),
    Case("float8", 2, 2, 1, 6, 4, 2, cache="float8_e5m2"),
    Case("int8", 2, 2, 1, 6, 4, 2, cache="int8", new="int8"),
    Case("int8_scaled", 2, 2, 3, 140, 128, 2, cache="int8", scaled=True, ring=True),
    Case("int8_scaled_one_token", None, 3, 2, 40, 4, 1, cache="int8", new="bfloat16", scaled=True),
    Case("float8_scaled", 2, 2, 1, 6, 4, 2, cache="float8_e4m3fn", scaled=True),
    Case("rows", 2, 2, 2, 25, 128, 1),
    Case("rows_chunk", 2, 2, 2, 25, 128, 3, cache="bfloat16"),
    Case("rows_long_chunk", 2, 2, 1, 48, 128, 40, cache="bfloat16", new="bfloat16"),
    Case("rows_long_ring", 2, 2, 1, 40, 128, 50, ring=True),
    Case("lanes_long_chunk", 2, 2, 2, 400, 8, 300, ring=True),
)


def _model(name: str, batch: int, tokens: int, cache: str) -> Case:
    shape = SHAPES[name]
    slots = 4096 if shape.window is None else -(-(shape.window + tokens - 1) // 128) * 128
    return Case(
        f"{name}-append{tokens}-batch{batch}" + ("" if cache == "bfloat16" else f"-{cache}"),
        2,
        batch,
        shape.kv_heads,
        slots,
        shape.head_dim,
        tokens,
        cache,
        "bfloat16",
        shape.window is not None,
        cache != "bfloat16",
    )


MODELS = tuple(
    _model(name, batch, tokens, cache)
    for name in SHAPES
    if name != "deepseek-v3"  # it caches the latent
    for batch, tokens in ((1, 1), (32, 1), (256, 1), (32, 5), (1, 1024))
    for cache in ("bfloat16", "int8")
)
