"""Named calls of `quantized_matmul`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """Shapes and dtypes of one call; `lead` are the leading axes of x."""

    name: str
    lead: tuple[int, ...]
    inner: int
    columns: int
    dtype: str = "float32"
    weight: str = "float32"
    transpose: bool = False
    out: str | None = None

    @property
    def w_shape(self) -> tuple[int, int]:
        return (self.columns, self.inner) if self.transpose else (self.inner, self.columns)

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Random x, w (integers for int8, else float32), and the scales of an int8 w."""
        random = np.random.default_rng(seed)
        x = random.normal(size=(*self.lead, self.inner)).astype(np.float32)
        w, scales = random.normal(size=self.w_shape).astype(np.float32), None
        if self.weight == "int8":
            w = np.clip(np.rint(40 * w), -127, 127)
            scales = random.uniform(0.01, 0.05, self.columns).astype(np.float32)
        return x, w, scales


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


SMALL = [
    *_small("float32", "float32"),
    *_small("float32", "bfloat16"),
    *_small("float32", "int8"),
    *_small("bfloat16", "bfloat16"),
    *_small("bfloat16", "int8"),
    *_small("float16", "float16"),
    Case("vector", (), 64, 600, "float32", "int8"),
    Case("eight-rows", (8,), 576, 64, "float32", "int8"),
    Case("tiny", (1,), 1, 1),
    Case("tiny-int8", (4,), 3, 5, "bfloat16", "int8"),
    Case("mixed", (5,), 64, 520, "bfloat16", "float32"),
    Case("odd-rows-of-the-weight", (1,), 128, 301, "float32", "int8", True),
    Case("tiles-that-overlap", (20,), 1024, 301, "float32", "bfloat16"),
    Case("tiles-that-overlap-transposed", (20,), 1024, 301, "float32", "int8", True),
]

# The matrices of one layer, (in, out), and the head, of published models.
WEIGHTS = {
    "smollm-135m": ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)),
    "llama3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 128256)),
    "llama3-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192), (8192, 128256)),
    "gemma3-12b": ((3840, 4096), (3840, 2048), (3840, 15360), (15360, 3840), (3840, 262208)),
}

MODELS = [
    Case(f"{name}-{inner}x{columns}-{rows}-rows-{weight}", (rows,), inner, columns, "bfloat16", weight)
    for name, shapes in WEIGHTS.items()
    for inner, columns in shapes
    for rows in (1, 32, 4096)
    for weight in ("bfloat16", "int8")
]
