"""Named calls of `flash_decode`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_shapes import SHAPES
from pallas_kernels.flash_attention.cases import per_head, tree
from pallas_kernels.flash_decode.api import flash_decode
from pallas_kernels.flash_decode.blocks import Blocks
from pallas_kernels.named import Call, Work

Maker = Callable[[np.random.Generator, "Case"], np.ndarray]


@dataclass(frozen=True)
class Case:
    """Shapes, dtypes and options of one call. `queries` are the new tokens, `cache` the dtype of k and v.

    scales: whether a float8 cache has them; an int8 one always does.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    slots: int
    head_dim: int
    value_dim: int
    dtype: str = "float32"
    cache: str = "float32"
    layers: int | None = None
    lengths: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Maker] = field(default_factory=dict)
    scales: bool = False

    @property
    def scaled(self) -> bool:
        return self.scales or self.cache == "int8"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v."""
        lead = () if self.layers is None else (self.layers,)
        return (
            (self.batch, self.heads, self.queries, self.head_dim),
            (*lead, self.batch, self.kv_heads, self.slots, self.head_dim),
            (*lead, self.batch, self.kv_heads, self.slots, self.value_dim),
        )

    def inputs(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Random q, k, v (integers for an int8 cache, else float32), and the options."""
        random = np.random.default_rng(seed)
        q, k, v = (random.normal(size=shape).astype(np.float32) for shape in self.shapes)
        options = {**self.options, **{name: make(random, self) for name, make in self.arrays.items()}}
        if self.cache == "int8":
            k, v = (np.clip(np.rint(40 * x), -127, 127) for x in (k, v))
        if self.scaled:
            for name, x in (("k_scale", k), ("v_scale", v)):
                options[name] = random.uniform(0.01, 0.05, x.shape[:-1]).astype(np.float32)
        return [q, k, v], options

    @property
    def shared(self) -> bool:
        """Whether the values are the keys: latent attention."""
        return self.layers is not None and self.head_dim > self.value_dim

    def call(self, implementation: Any = "pallas", blocks: Blocks | None = None) -> Call:
        """The last layer's call, lengths concrete, everything else by shape."""
        q, k, v = self.shapes
        arrays: dict[str, Any] = dict(
            q=jax.ShapeDtypeStruct(q, self.dtype),
            k=jax.ShapeDtypeStruct(k, self.cache),
            lengths=np.array(self.lengths, np.int32),
        )
        if not self.shared:
            arrays["v"] = jax.ShapeDtypeStruct(v, self.cache)
        if self.scaled:
            arrays |= {name: jax.ShapeDtypeStruct(k[:-1], jnp.float32) for name in ("k_scale", "v_scale")}
        random = np.random.default_rng(0)
        for name, make in self.arrays.items():
            value = make(random, self)
            arrays[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        layer = None if self.layers is None else self.layers - 1

        def fn(*args):
            given = dict(zip(arrays, args, strict=True))
            if self.shared:
                given["v"] = given["k"]
            return flash_decode(**given, layer=layer, **self.options, implementation=implementation, blocks=blocks)

        return Call(fn, tuple(arrays.values()), self.work)

    @property
    def work(self) -> Work:
        """Scores and weighted sums of live slots; they, the queries and the results cross HBM once."""
        live = np.clip(np.array(self.lengths), 0, self.slots)
        window = self.options.get("window")
        if isinstance(window, int):
            live = np.minimum(live, window + self.queries - 1)
        slots = float(live.sum())
        dims = self.head_dim + self.value_dim
        size = jnp.dtype(self.cache).itemsize
        stored = (self.head_dim if self.shared else dims) * size + (8 if self.scaled else 0)
        rows = self.batch * self.heads * self.queries
        return Work(
            flops=2.0 * self.heads * self.queries * slots * dims,
            bytes=self.kv_heads * slots * stored + rows * dims * jnp.dtype(self.dtype).itemsize,
            dtype="float32" if "float32" in (self.dtype, self.cache) else "bfloat16",
        )


def _small(
    name: str,
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    tokens: tuple[int, int],
    dims: tuple[int, int],
    **rest: Any,
):
    arrays = cast("dict[str, Maker]", {key: value for key, value in rest.items() if callable(value)})
    fixed = {key: rest.pop(key) for key in ("dtype", "cache", "layers", "scales") if key in rest}
    options = {key: value for key, value in rest.items() if key not in arrays}
    return Case(
        name, len(lengths), *heads, *tokens, *dims, lengths=lengths, options=options, arrays=arrays, **fixed
    )


SMALL = (
    _small("one_token", (1, 9, 17, 0), (4, 2), (1, 17), (64, 64), layers=3),
    _small("verify", (4, 30), (6, 2), (4, 30), (80, 80), layers=2),
    _small("shorter_than_the_chunk", (2, 5), (2, 1), (5, 12), (16, 16)),
    _small("padding_past_the_end", (14, 12), (2, 1), (4, 12), (16, 16)),
    _small("many_tokens", (64, 50), (2, 1), (33, 64), (16, 16)),
    _small("window", (30, 3), (4, 1), (2, 30), (96, 96), layers=2, window=4),
    _small("wide_window", (30, 3), (2, 1), (2, 30), (16, 16), window=19),
    _small(
        "softcap_sinks_alibi",
        (11, 0),
        (4, 4),
        (2, 13),
        (128, 64),
        softcap=4.0,
        sinks=per_head,
        alibi_slopes=per_head,
    ),
    _small("ring_part_full", (5, 0, 11), (4, 2), (2, 11), (16, 16), layers=2, ring=True),
    _small("ring_wrapped", (40, 12, 23), (4, 2), (3, 11), (16, 16), ring=True, window=9),
    _small("tree", (9, 14), (4, 2), (5, 14), (16, 16), ancestor_mask=tree, window=8, alibi_slopes=per_head),
    _small(
        "ring_tree", (9, 31), (2, 2), (5, 14), (16, 16), ring=True, ancestor_mask=tree, window=10, sinks=per_head
    ),
    _small("long", (300, 129, 0, 128), (4, 2), (2, 300), (128, 16), sinks=per_head),
    _small("long_window", (400, 250), (2, 1), (3, 400), (128, 128), layers=2, window=140, alibi_slopes=per_head),
    _small("long_ring", (700, 200), (2, 1), (2, 261), (16, 128), ring=True, window=150),
    _small("long_tree", (258, 300), (2, 1), (5, 300), (128, 16), ancestor_mask=tree),
    _small("long_int8", (300, 7), (4, 2), (1, 300), (128, 128), cache="int8", window=170, dtype="bfloat16"),
    _small("int8", (13, 2), (4, 2), (2, 16), (64, 64), layers=2, cache="int8", window=12),
    _small("float8", (13, 2), (4, 2), (2, 16), (64, 64), cache="float8_e4m3fn"),
    _small("float8_scaled", (13, 0, 2), (4, 2), (2, 16), (96, 96), layers=2, cache="float8_e4m3fn", scales=True),
    _small(
        "long_float8",
        (300, 7),
        (4, 2),
        (1, 300),
        (128, 128),
        cache="float8_e4m3fn",
        scales=True,
        window=170,
        dtype="bfloat16",
    ),
    _small("bfloat16", (13, 2), (4, 2), (2, 16), (256, 256), layers=2, dtype="bfloat16", cache="bfloat16"),
    _small("bfloat16_bits", (13, 2), (4, 2), (2, 16), (64, 64), layers=2, cache="uint16"),
)


def _model(name: str, batch: int, context: int, ways: int, cache: str) -> Case:
    shape = SHAPES[name].shard(ways)
    ring = {} if shape.window is None else {"ring": True, "window": shape.window}
    return Case(
        f"{name}-decode-{context // 1024}k-batch{batch}"
        + ("" if ways == 1 else f"-shard{ways}")
        + ("" if cache == "bfloat16" else f"-{cache}"),
        batch,
        shape.heads,
        shape.kv_heads,
        1,
        context if shape.window is None else min(context, shape.window),
        shape.head_dim,
        shape.value_dim,
        "bfloat16",
        cache,
        2,
        (context,) * batch,
        MappingProxyType(ring),
        MappingProxyType({"sinks": per_head} if shape.sinks else {}),
    )


# Of the largest, one layer alone would fill a chip: they are left out.
MODELS = tuple(
    case
    for name in SHAPES
    if name != "deepseek-v3"  # decoding absorbs the up-projections
    for batch in (1, 32, 256)
    for context in (4096, 32768)
    for ways in (1, 8)
    for cache in ("bfloat16", "int8")
    if (case := _model(name, batch, context, ways, cache)).work.bytes < 6e9
)
