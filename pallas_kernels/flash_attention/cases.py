"""Named calls of `flash_attention`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_shapes import SHAPES
from pallas_kernels.dispatch import Implementation
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.blocks import Blocks
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks
from pallas_kernels.named import Call, Work
from pallas_kernels.validate import window_sides

Maker = Callable[[np.random.Generator, "Case"], np.ndarray]


@dataclass(frozen=True)
class Case:
    """Shapes, dtype and options of one call. `arrays` make the options that are arrays."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Maker] = field(default_factory=dict)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v."""
        return (
            (self.batch, self.heads, self.queries, self.head_dim),
            (self.batch, self.kv_heads, self.keys, self.head_dim),
            (self.batch, self.kv_heads, self.keys, self.value_dim),
        )

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, of one row and head, by the causal rule and the window."""
        t = np.arange(self.queries)
        left, right = window_sides(self.options.get("window"))
        causal = self.options.get("causal", True)
        ends = np.minimum(t + 1 if causal else self.keys, self.keys if right is None else t + right + 1)
        starts = 0 if left is None else t - left
        return int(np.maximum(np.minimum(ends, self.keys) - np.maximum(starts, 0), 0).sum())

    def call(
        self, implementation: Implementation | None = "pallas", blocks: Blocks | XlaBlocks | None = None
    ) -> Call:
        """This call, for masks that are causal or windows; q, k, v are shapes only."""
        q, k, v = (jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in self.shapes)
        random = np.random.default_rng(0)
        names = list(self.arrays)
        made = [self.arrays[name](random, self) for name in names]

        def fn(q, k, v, *arrays):
            given = dict(zip(names, arrays, strict=True))
            return flash_attention(q, k, v, **self.options, **given, blocks=blocks, implementation=implementation)

        pairs = self.batch * self.heads * self.visible
        size = q.dtype.itemsize
        moved = sum(math.prod(shape) for shape in self.shapes) + math.prod(self.shapes[0][:3]) * self.value_dim
        work = Work(2.0 * pairs * (self.head_dim + self.value_dim), float(size * moved), self.dtype)
        return Call(fn, (q, k, v, *made), work)

    def inputs(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Random q, k, v in float32, and the options."""
        random = np.random.default_rng(seed)
        qkv = [random.normal(size=shape).astype(np.float32) for shape in self.shapes]
        return qkv, {**self.options, **{name: make(random, self) for name, make in self.arrays.items()}}


def per_head(random: np.random.Generator, case: Any) -> np.ndarray:
    return random.normal(size=case.heads).astype(np.float32)


def tree(random: np.random.Generator, case: Any) -> np.ndarray:
    """For each row a random tree of `case.queries` nodes, children after parents: bool [B, T, T]."""
    masks = np.zeros((case.batch, case.queries, case.queries), bool)
    for mask in masks:
        for node in range(case.queries):
            if node:
                mask[node] = mask[random.integers(node)]
            mask[node, node] = True
    return masks


def constant(*values: int) -> Maker:
    return lambda random, case: np.array(values, np.int32)


def packed(length: str, documents: int) -> Maker:
    """Segment ids of documents packed one after another, ends at random; the same for queries and keys."""

    def make(random: np.random.Generator, case: Case) -> np.ndarray:
        size = getattr(case, length)
        ends = np.linspace(0, size, documents + 1).astype(int)[1:-1] + np.arange(case.batch)[:, None] % 2
        return (np.arange(size) >= ends[..., None]).sum(1).astype(np.int32)

    return make


def cells(*shape: int) -> Maker:
    return lambda random, case: random.random(shape) < 0.5


def _small(
    name: str, batch: int, heads: tuple[int, int], tokens: tuple[int, int], dims: tuple[int, int], **rest: Any
):
    arrays = cast("dict[str, Maker]", {key: value for key, value in rest.items() if callable(value)})
    dtype = rest.pop("dtype", "float32")
    options = {key: value for key, value in rest.items() if key not in arrays}
    return Case(name, batch, *heads, *tokens, *dims, dtype, options, arrays)


SMALL = (
    _small("plain", 2, (2, 2), (17, 17), (64, 64)),
    _small("one_token", 1, (4, 1), (1, 1), (80, 80)),
    _small("chunk", 2, (6, 2), (9, 33), (96, 64), q_offset=constant(24, 7)),
    _small("lengths", 3, (4, 1), (13, 13), (128, 128), lengths=constant(13, 0, 5)),
    _small("window_below_block", 1, (2, 1), (40, 40), (64, 64), window=3),
    _small("window_above_block", 1, (2, 2), (40, 40), (16, 16), window=27),
    _small("both_ways", 2, (2, 1), (21, 26), (16, 16), causal=False, window=(4, 2), lengths=constant(26, 9)),
    _small("softcap_sinks", 2, (4, 2), (19, 19), (256, 256), softcap=5.0, sinks=per_head, lengths=constant(0, 19)),
    _small("alibi", 1, (4, 4), (20, 20), (16, 16), alibi_slopes=per_head, scale=0.5),
    _small(
        "packed",
        2,
        (2, 1),
        (32, 32),
        (16, 16),
        q_segment_ids=packed("queries", 3),
        kv_segment_ids=packed("keys", 3),
    ),
    _small("block_mask", 1, (4, 2), (30, 35), (16, 16), causal=False, block_mask=cells(4, 4, 5)),
    _small("tree", 2, (4, 2), (7, 20), (16, 16), q_offset=constant(5, 0), window=6, ancestor_mask=tree),
    _small(
        "everything",
        2,
        (4, 2),
        (19, 23),
        (16, 8),
        window=(9, None),
        softcap=3.0,
        sinks=per_head,
        alibi_slopes=per_head,
        q_segment_ids=packed("queries", 2),
        kv_segment_ids=packed("keys", 2),
        lengths=constant(23, 11),
        q_offset=constant(-2, 4),
        block_mask=cells(5, 4),
    ),
    _small("bfloat16", 2, (4, 2), (18, 21), (64, 64), dtype="bfloat16", q_offset=constant(3, 3), sinks=per_head),
)


def _model(name: str, tokens: int, ways: int) -> Case:
    shape = SHAPES[name].shard(ways)
    return Case(
        f"{name}-prefill-{tokens // 1024}k" + ("" if ways == 1 else f"-shard{ways}"),
        1,
        shape.heads,
        shape.kv_heads,
        tokens,
        tokens,
        shape.head_dim,
        shape.value_dim,
        "bfloat16",
        MappingProxyType({} if shape.window is None else {"window": shape.window}),
        MappingProxyType({"sinks": per_head} if shape.sinks else {}),
    )


MODELS = (
    *(
        _model(name, tokens, ways)
        for name in SHAPES
        if name != "deepseek-v3-latent"  # prefill expands the latent
        for tokens in (1024, 4096, 32768)
        for ways in (1, 8)
    ),
    replace(_model("llama3-8b", 4096, 1), name="llama3-8b-prefill-4k-window1024", options={"window": 1024}),
)
