"""Named calls of `streamed_matmul`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from pallas_kernels.named import Call, Work
from pallas_kernels.streamed_matmul.api import streamed_matmul
from pallas_kernels.streamed_matmul.blocks import Blocks
from pallas_kernels.vmem import bits


@dataclass(frozen=True)
class Case:
    """Shapes and dtypes of one call; `layers` of a stack, or None: operands of one layer."""

    name: str
    rows: int
    inner: int
    columns: tuple[int, ...]
    dtype: str = "bfloat16"
    weight: str = "int8"
    layers: int | None = None
    out: str | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.layers is None else (self.layers,)

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray] | None]:
        """Random float32 x; the weights in their dtype; and the scales of narrow ones."""
        random = np.random.default_rng(seed)
        x = random.normal(size=(self.rows, self.inner)).astype(np.float32)
        shapes = [(*self.lead, self.inner, n) for n in self.columns]
        if self.weight != "int8":
            return x, [random.normal(size=s).astype(jnp.dtype(self.weight)) for s in shapes], None
        weights = [random.integers(-127, 128, s).astype(np.int8) for s in shapes]
        scales = [random.uniform(0.01, 0.05, (*self.lead, n)).astype(np.float32) for n in self.columns]
        return x, weights, scales

    def call(self, implementation: Implementation = "pallas", blocks: Blocks | None = None) -> Call:
        """The op at this case's shapes, nothing concrete, and the least work in it."""
        x = jax.ShapeDtypeStruct((self.rows, self.inner), jnp.dtype(self.dtype))
        weights = [jax.ShapeDtypeStruct((*self.lead, self.inner, n), jnp.dtype(self.weight)) for n in self.columns]
        scales = [jax.ShapeDtypeStruct((*self.lead, n), jnp.float32) for n in self.columns]
        fn = partial(streamed_matmul, out_dtype=self.out, blocks=blocks, implementation=implementation)
        total, narrow = sum(self.columns), self.weight == "int8"
        traffic = self.rows * self.inner * bits(self.dtype) + self.inner * total * bits(self.weight)
        traffic += self.rows * total * bits(self.out or self.dtype) + 32 * total * narrow
        work = Work(2.0 * self.rows * self.inner * total, traffic / 8, self.dtype)
        if self.layers is None:
            return Call(fn, (x, weights, scales if narrow else None), work)
        one = np.zeros((), np.int32)
        given = (x, weights, scales if narrow else None, one)
        return Call(lambda x, w, s, layer: fn(x, w, s, layer=layer), given, work)


SMALL = [
    Case("one-weight", 8, 256, (128,), "float32"),
    Case("three-weights", 3, 384, (256, 128, 128), "float32", layers=3),
    Case("bfloat16", 5, 256, (128, 256), layers=2, out="float32"),
    Case("bfloat16-weights", 16, 256, (128, 128), weight="bfloat16"),
    Case("float32-weights", 1, 128, (384,), "float32", "float32", layers=2),
    Case("many-rows", 200, 256, (128,), "float32"),
]

# What the chips of a mesh multiply in a decode step: queries, keys and values; gate and up; the last products.
MODELS = [
    Case("llama3-70b-16th-qkv-8-rows", 8, 8192, (512, 128, 128), layers=2),
    Case("llama3-70b-16th-ffn-8-rows", 8, 8192, (1792, 1792), layers=2),
    Case("llama3-70b-16th-down-128-rows", 128, 1792, (8192,), layers=2),
    Case("llama3-8b-8th-ffn-64-rows", 64, 4096, (1792, 1792), layers=2),
]
