"""Named calls of `grouped_matmul`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.named import Call, Work
from pallas_kernels.vmem import bits, narrow


@dataclass(frozen=True)
class Case:
    """Shapes and dtypes of one call. `sizes` are the rows of each group; they may leave rows over."""

    name: str
    rows: int
    inner: int
    columns: int
    sizes: tuple[int, ...]
    dtype: str = "float32"
    weight: str = "float32"
    transpose: bool = False
    scales: int = 1

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (len(self.sizes), *([self.scales] if self.scales > 1 else []), self.columns)

    @property
    def rhs_shape(self) -> tuple[int, int, int]:
        matrix = (self.columns, self.inner) if self.transpose else (self.inner, self.columns)
        return (len(self.sizes), *matrix)

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Random lhs, rhs (whole numbers for a narrow one), group sizes, and the scales of a narrow rhs."""
        random = np.random.default_rng(seed)
        lhs = random.normal(size=(self.rows, self.inner)).astype(np.float32)
        rhs, scale = random.normal(size=self.rhs_shape).astype(np.float32), None
        if narrow(self.weight):
            most = {"int8": 127, "int4": 7}[self.weight]
            rhs = np.clip(np.rint(rhs * most / 3), -most, most)
            scale = random.uniform(0.01, 0.05, self.scale_shape).astype(np.float32)
        return lhs, rhs, np.asarray(self.sizes, np.int32), scale

    def call(self, implementation: Implementation = "pallas", blocks: Blocks | None = None) -> Call:
        """The op at this case's shapes, with concrete group sizes, and the least work in it."""
        lhs = jax.ShapeDtypeStruct((self.rows, self.inner), jnp.dtype(self.dtype))
        rhs = jax.ShapeDtypeStruct(self.rhs_shape, jnp.dtype(self.weight))
        scale = jax.ShapeDtypeStruct(self.scale_shape, jnp.float32) if narrow(self.weight) else None

        def fn(lhs, rhs, sizes, scale):
            run = partial(grouped_matmul, transpose=self.transpose, blocks=blocks, implementation=implementation)
            return run(lhs, rhs, sizes, rhs_scale=scale)

        used, active = sum(self.sizes), sum(size > 0 for size in self.sizes)
        traffic = (used * self.inner + self.rows * self.columns) * bits(self.dtype)
        traffic += active * self.inner * self.columns * bits(self.weight)
        traffic += 32 * active * self.scales * self.columns if narrow(self.weight) else 0
        products = "float32" if self.dtype == "float32" else "bfloat16"
        work = Work(2.0 * used * self.inner * self.columns, traffic / 8, products)
        return Call(fn, (lhs, rhs, np.asarray(self.sizes, np.int32), scale), work)


SMALL = [
    Case("even", 12, 48, 40, (4, 4, 4)),
    Case("empty-groups", 9, 64, 40, (0, 5, 0, 4, 0)),
    Case("one-row", 1, 64, 8, (0, 1, 0)),
    Case("one-group", 5, 64, 7, (5,)),
    Case("all-in-one", 70, 24, 9, (0, 70, 0)),
    Case("rows-left-over", 10, 64, 12, (3, 0, 4)),
    Case("no-rows-used", 3, 64, 5, (0, 0)),
    Case("odd", 11, 13, 7, (2, 6, 3)),
    Case("a-row-each", 8, 64, 64, (1,) * 8),
    Case("past-a-tile", 40, 64, 16, (33, 1, 0, 6)),
    Case("many-rows", 620, 16, 24, (130, 1, 0, 489)),
    Case("bfloat16", 12, 64, 40, (1, 9, 2), "bfloat16", "bfloat16"),
    Case("bfloat16-many", 150, 32, 40, (20, 130), "bfloat16", "bfloat16"),
    Case("bfloat16-weight", 7, 64, 40, (1, 4, 2), "float32", "bfloat16"),
    Case("float16", 60, 64, 16, (3, 40, 17), "float16", "float16"),
    Case("int8", 12, 64, 40, (1, 8, 0, 3), "float32", "int8"),
    Case("int8-bfloat16", 40, 64, 40, (30, 8, 0, 1), "bfloat16", "int8"),
    Case("int4", 12, 64, 40, (1, 8, 0, 3), "float32", "int4"),
    Case("int4-scales", 12, 256, 40, (1, 8, 0, 3), "float32", "int4", scales=2),
    Case("int4-bfloat16-scales", 50, 256, 136, (30, 8, 0, 11), "bfloat16", "int4", scales=2),
    Case("int8-small-parts", 40, 192, 40, (30, 8, 0, 1), "float32", "int8", scales=3),
    Case("int8-transposed-parts", 9, 256, 40, (1, 2, 6), "float32", "int8", transpose=True, scales=2),
    Case("int4-transposed-small-parts", 9, 192, 40, (1, 2, 6), "float32", "int4", transpose=True, scales=6),
    Case("transposed", 12, 64, 40, (1, 8, 0, 3), transpose=True),
    Case("transposed-int8", 9, 128, 24, (1, 2, 6), "float32", "int8", transpose=True),
    Case("transposed-bfloat16", 300, 64, 24, (200, 99), "bfloat16", "bfloat16", transpose=True),
]

# Experts of published models: how many, how many a token takes, and the sizes (in, out) of their first matrix;
# the second is its transpose. gpt-oss and qwen3-30b-a3b have many small experts, mixtral a few large ones. A shard
# is one of eight: along the hidden layer in mixtral, of the experts in qwen3.
EXPERTS = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "mixtral-8x7b-shard": (8, 2, 4096, 1792),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-30b-a3b-shard": (16, 1, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "deepseek-v3": (256, 8, 7168, 2048),
}


def _spread(tokens: int, experts: int, top: int) -> tuple[int, ...]:
    """Rows of each expert when `tokens` tokens draw `top` experts each, evenly and at random."""
    random = np.random.default_rng(0)
    chosen = np.argsort(random.random((tokens, experts)), axis=1)[:, :top]
    return tuple(int(n) for n in np.bincount(chosen.ravel(), minlength=experts))


def _model(name: str, tokens: int, weight: str) -> list[Case]:
    experts, top, inner, columns = EXPERTS[name]
    sizes = _spread(tokens, experts, top)
    label = f"{name}-{tokens}-tokens-{weight}"

    def parts(k: int) -> int:
        return k // next(g for g in (128, 64, 32) if k % g == 0) if weight == "int4" else 1

    return [
        Case(f"{label}-up", sum(sizes), inner, columns, sizes, "bfloat16", weight, scales=parts(inner)),
        Case(f"{label}-down", sum(sizes), columns, inner, sizes, "bfloat16", weight, scales=parts(columns)),
    ]


MODELS = [
    *(case for name in EXPERTS for tokens in (32, 4096) for case in _model(name, tokens, "bfloat16")),
    *(case for name in EXPERTS if "shard" not in name for case in _model(name, 32, "int8")),
    *_model("qwen3-30b-a3b", 1, "bfloat16"),
    *_model("qwen3-30b-a3b", 256, "bfloat16"),
    *_model("mixtral-8x7b", 4096, "int8"),
    *(case for name in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b") for case in _model(name, 32, "int4")),
    Case("even-8-of-4096", 4096, 4096, 14336, (512,) * 8, "bfloat16", "bfloat16"),
]
