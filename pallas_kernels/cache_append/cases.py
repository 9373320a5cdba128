"""Named calls of `cache_append`: SMALL ones for the contract tests, MODELS for benchmarks."""

from dataclasses import dataclass

from pallas_kernels.attention_shapes import SHAPES


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

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of cache and new."""
        lead = () if self.layers is None else (self.layers,)
        return (
            (*lead, self.batch, self.kv_heads, self.slots, self.head_dim),
            (self.batch, self.kv_heads, self.tokens, self.head_dim),
        )


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
)

MODELS = tuple(
    Case(
        f"{name}-append{tokens}-batch{batch}",
        2,
        batch,
        shape.kv_heads,
        4096 if shape.window is None else shape.window + tokens - 1,
        shape.head_dim,
        tokens,
        "bfloat16",
        "bfloat16",
        shape.window is not None,
    )
    for name, shape in SHAPES.items()
    if name != "deepseek-v3"  # it caches the latent
    for batch in (1, 32, 256)
    for tokens in (1, 5)
)
