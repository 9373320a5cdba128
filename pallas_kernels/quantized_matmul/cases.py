"""Named calls of `quantized_matmul`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from pallas_kernels.named import Call, Work
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.blocks import Blocks
from pallas_kernels.vmem import bits, narrow


@dataclass(frozen=True)
class Case:
    """Shapes and dtypes of one call; `lead` are the leading axes of x, `groups` the scales of a column."""

    name: str
    lead: tuple[int, ...]
    inner: int
    columns: int
    dtype: str = "float32"
    weight: str = "float32"
    transpose: bool = False
    out: str | None = None
    groups: int = 1
    activations: Literal["int8"] | None = None

    @property
    def w_shape(self) -> tuple[int, int]:
        return (self.columns, self.inner) if self.transpose else (self.inner, self.columns)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        return (self.columns,) if self.groups == 1 else (self.groups, self.columns)

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Random float32 x; w in its dtype; and the scales of a narrow w."""
        random = np.random.default_rng(seed)
        x = random.normal(size=(*self.lead, self.inner)).astype(np.float32)
        w, scales = random.normal(size=self.w_shape).astype(np.float32), None
        if narrow(self.weight):
            largest = {"int8": 127, "int4": 7}.get(self.weight)
            w = 40 * w if largest is None else np.clip(np.rint(w * largest / 3), -largest, largest)
            scales = random.uniform(0.01, 0.05, self.scales_shape).astype(np.float32)
        return x, w.astype(jnp.dtype(self.weight)), scales

    def call(self, implementation: Implementation = "pallas", blocks: Blocks | None = None) -> Call:
        """The op at this case's shapes, nothing concrete, and the least work in it."""
        x = jax.ShapeDtypeStruct((*self.lead, self.inner), jnp.dtype(self.dtype))
        w = jax.ShapeDtypeStruct(self.w_shape, jnp.dtype(self.weight))
        scales = jax.ShapeDtypeStruct(self.scales_shape, jnp.float32) if narrow(self.weight) else None
        fn = partial(
            quantized_matmul,
            transpose=self.transpose,
            activations=self.activations,
            out_dtype=self.out,
            blocks=blocks,
            implementation=implementation,
        )
        rows = int(np.prod(self.lead))
        traffic = rows * self.inner * bits(self.dtype) + self.inner * self.columns * bits(self.weight)
        traffic += rows * self.columns * bits(self.out or self.dtype)
        traffic += 32 * self.groups * self.columns if narrow(self.weight) else 0
        products = self.activations or ("float32" if self.dtype == "float32" else "bfloat16")
        return Call(fn, (x, w, scales), Work(2.0 * rows * self.inner * self.columns, traffic / 8, products))


def _small(dtype: str, weight: str) -> list[Case]:
    name = f"{dtype}-{weight}"
    cases = [
        Case(f"{name}-one-row", (1,), 192, 256, dtype, weight),
        Case(f"{name}-three-rows", (1, 3), 192, 200, dtype, weight),
        Case(f"{name}-many-rows", (2, 9), 192, 700, dtype, weight, out="float32"),
        Case(f"{name}-odd", (2, 3), 190, 203, dtype, weight),
    ]
    turned = [Case(f"{c.name}-transposed", c.lead, c.inner, c.columns, dtype, weight, True, c.out) for c in cases]
    return cases + turned


def _formats() -> list[Case]:
    """Formats of 4 and 8 bits beside int8 with a scale a column, each with its transpose."""
    cases = [
        Case("int4", (9,), 192, 256, weight="int4"),
        Case("int4-groups", (3,), 256, 200, weight="int4", groups=2),
        Case("int4-groups-many-rows", (140,), 256, 136, "bfloat16", "int4", groups=2),
        Case("int4-small-groups", (5,), 192, 130, "bfloat16", "int4", groups=6),
        Case("int8-groups", (4,), 256, 64, weight="int8", groups=2),
        Case("fp8", (3,), 192, 200, weight="float8_e4m3fn"),
        Case("fp8-many-rows", (300,), 64, 136, "bfloat16", "float8_e4m3fn"),
        Case("fp8-groups", (6,), 256, 40, "bfloat16", "float8_e4m3fn", groups=2),
        Case("bytes", (5,), 192, 200, weight="int8", activations="int8"),
        Case("bytes-bfloat16", (2, 30), 190, 203, "bfloat16", "int8", activations="int8"),
        Case("bytes-int4", (7,), 192, 256, weight="int4", activations="int8"),
        Case("bytes-int4-groups", (7,), 256, 256, weight="int4", groups=2, activations="int8"),
    ]
    return cases + [replace(c, name=f"{c.name}-transposed", transpose=True) for c in cases]


SMALL = [
    *_small("float32", "float32"),
    *_small("float32", "bfloat16"),
    *_small("float32", "int8"),
    *_small("bfloat16", "bfloat16"),
    *_small("bfloat16", "int8"),
    *_small("float16", "float16"),
    *_formats(),
    Case("vector", (), 64, 600, "float32", "int8"),
    Case("eight-rows", (8,), 576, 64, "float32", "int8"),
    Case("tiny", (1,), 1, 1),
    Case("tiny-int8", (4,), 3, 5, "bfloat16", "int8"),
    Case("mixed", (5,), 64, 520, "bfloat16", "float32"),
    Case("odd-rows-of-the-weight", (1,), 128, 301, "float32", "int8", True),
    Case("tiles-that-overlap", (20,), 1024, 301, "float32", "bfloat16"),
    Case("tiles-that-overlap-transposed", (20,), 1024, 301, "float32", "int8", True),
]

# The matrices of one layer, (in, out), and the head, of published models; "shard" is one of eight along the heads
# and the hidden layer.
WEIGHTS = {
    "smollm-135m": ((576, 1536), (1536, 576)),
    "llama3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 128256)),
    "llama3-70b-shard": ((8192, 1024), (8192, 128), (8192, 3584), (3584, 8192)),
    "qwen3-8b": ((4096, 12288), (12288, 4096)),
    "gemma3-12b": ((3840, 4096), (3840, 15360), (15360, 3840), (3840, 262208)),
}
_HEAD = 100_000


def _model(name: str, shape: tuple[int, int], rows: int, weight: str, groups=1, activations=None) -> Case:
    inner, columns = shape
    label = weight + (f"-g{inner // groups}" if groups > 1 else "") + ("-a8" if activations else "")
    label = f"{name}-{inner}x{columns}-{rows}-rows-{label}"
    return Case(label, (rows,), inner, columns, "bfloat16", weight, groups=groups, activations=activations)


MODELS = [
    *(
        _model(name, shape, rows, "int8")
        for name, shapes in WEIGHTS.items()
        for shape in shapes
        for rows in ((1, 32) if shape[1] > _HEAD else (1, 32, 4096) if name == "llama3-8b" else (32, 4096))
    ),
    *(
        _model("llama3-8b", shape, rows, weight, shape[0] // 128 if weight == "int4" else 1, activations)
        for shape in ((4096, 14336), (14336, 4096))
        for rows in (32, 4096)
        for weight, activations in (("int4", None), ("float8_e4m3fn", None), ("int8", "int8"), ("bfloat16", None))
    ),
]
