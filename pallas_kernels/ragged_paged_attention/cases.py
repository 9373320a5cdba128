"""Named calls of `ragged_paged_attention`: SMALL ones for the contract tests, MODELS for benchmarks and tuning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_shapes import SHAPES
from pallas_kernels.named import Call, Work

Maker = Callable[[np.random.Generator, "Case"], np.ndarray]


def per_head(random: np.random.Generator, case: "Case") -> np.ndarray:
    return random.normal(size=case.heads).astype(np.float32)


def trees(random: np.random.Generator, case: "Case") -> np.ndarray:
    """A random tree for each row, of as many nodes as the case's `tree` says: bool [rows, T, T]."""
    size = case.tree
    mask = np.zeros((len(case.rows), size, size), bool)
    for tree in mask:
        for node in range(size):
            if node:
                tree[node] = tree[random.integers(0, node)]
            tree[node, node] = True
    return mask


@dataclass(frozen=True)
class Case:
    """Shapes, dtypes and options of one call. `rows` are (kv_length, new tokens) each, `cache` the pages' dtype."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page: int
    rows: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    cache: str = "float32"
    layers: int | None = None
    width: int | None = None
    latent: bool = False
    spare: int = 0  # tokens of no row, at the end
    physical: int | None = None  # pages that there are at most: rows share them
    runs: bool = False  # each row's pages follow each other, as an allocator with free memory gives them
    tree: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Maker] = field(default_factory=dict)

    @property
    def q_starts(self) -> np.ndarray:
        return np.cumsum([0, *(new for _, new in self.rows)]).astype(np.int32)

    @property
    def kv_lengths(self) -> np.ndarray:
        return np.array([length for length, _ in self.rows], np.int32)

    @property
    def page_counts(self) -> np.ndarray:
        return -(-self.kv_lengths // self.page)

    def page_table(self, junk: int = 0) -> np.ndarray:
        """Pages of all rows shuffled, unless `runs`; unused entries are `junk`."""
        counts = self.page_counts
        ids = np.arange(counts.sum())
        if not self.runs:
            ids = np.random.default_rng(7).permutation(ids)
        table = np.full((len(self.rows), max(counts.max(), 1)), junk, np.int32)
        for row, (start, count) in enumerate(zip(np.cumsum(counts) - counts, counts, strict=True)):
            table[row, :count] = ids[start : start + count] % (self.physical or len(ids))
        return table

    @property
    def page_width(self) -> int:
        return self.width or (self.head_dim if self.latent else self.head_dim + self.value_dim)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """Of q, pages and page_scales (None: none)."""
        lead = () if self.layers is None else (self.layers,)
        count = min(int(self.page_counts.sum()) + 2, self.physical or 1 << 30)
        scales = (*lead, count, 1, (1 if self.latent else 2) * self.kv_heads * self.page)
        return (
            (int(self.q_starts[-1]) + self.spare, self.heads, self.head_dim),
            (*lead, count, self.kv_heads, self.page, self.page_width),
            scales if self.cache == "int8" else None,
        )

    @property
    def static(self) -> dict[str, Any]:
        return {**self.options, "value_dim": self.value_dim, "latent": self.latent}

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Random q and pages (integers for int8, else float32), and the arrays among the options."""
        random = np.random.default_rng(seed)
        q, pages, scales = self.shapes
        arrays = {name: make(random, self) for name, make in self.arrays.items()}
        values = random.normal(size=pages).astype(np.float32)
        if scales is not None:
            values = np.clip(np.rint(40 * values), -127, 127)
            arrays["page_scales"] = random.uniform(0.01, 0.05, scales).astype(np.float32)
        return random.normal(size=q).astype(np.float32), values, arrays

    @property
    def work(self) -> Work:
        """Scores that are seen; live keys and values, scales, queries and results once."""
        window = self.options.get("window")
        pairs = keys = 0
        for length, new in self.rows:
            for t in range(new) if new < length else [None]:
                seen = length * (length + 1) // 2 if t is None else length - new + t + 1
                if window is not None:
                    rows = np.arange(length) + 1 if t is None else np.array([seen])
                    seen = int(np.minimum(rows, window).sum())
                pairs += seen
            keys += length if window is None else min(length, window + new - 1)
        row = self.head_dim if self.latent else self.head_dim + self.value_dim
        sizes = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}
        token = row * sizes[self.cache] + (4 * (1 if self.latent else 2) if self.cache == "int8" else 0)
        io = self.q_starts[-1] * self.heads * (self.head_dim + self.value_dim) * sizes[self.dtype]
        flops = 2.0 * self.heads * (self.head_dim + self.value_dim) * pairs
        return Work(flops, float(int(keys) * self.kv_heads * token + int(io)), self.dtype)

    def call(self, implementation: str = "pallas", blocks: Any = None) -> Call:
        from pallas_kernels.ragged_paged_attention import ragged_paged_attention

        q, pages, scales = self.shapes
        names = [*self.arrays, *(["page_scales"] if scales is not None else [])]
        given: dict[str, Any] = {name: make(np.random.default_rng(0), self) for name, make in self.arrays.items()}
        if scales is not None:
            given["page_scales"] = jax.ShapeDtypeStruct(scales, jnp.float32)
        options: dict[str, Any] = self.static | ({} if self.layers is None else {"layer": self.layers - 1})

        def fn(q, pages, table, lengths, starts, *rest):
            return ragged_paged_attention(
                q,
                pages,
                table,
                lengths,
                starts,
                **dict(zip(names, rest, strict=True)),
                **options,
                implementation=cast("Any", implementation),
                blocks=blocks,
            )

        arrays = (
            jax.ShapeDtypeStruct(q, jnp.dtype(self.dtype)),
            jax.ShapeDtypeStruct(pages, jnp.dtype(self.cache)),
            self.page_table(),
            self.kv_lengths,
            self.q_starts,
        )
        return Call(fn, (*arrays, *(given[name] for name in names)), self.work)


def _small(name: str, rows, heads: tuple[int, int], dims: tuple[int, int], page: int, **rest: Any) -> Case:
    arrays = cast("dict[str, Maker]", {key: value for key, value in rest.items() if callable(value)})
    fields = Case.__dataclass_fields__
    fixed = {key: value for key, value in rest.items() if key in fields}
    options = {key: value for key, value in rest.items() if key not in arrays and key not in fixed}
    return Case(name, *heads, *dims, page, rows, options=options, arrays=arrays, **fixed)


SMALL = (
    _small("decode", ((17, 1), (1, 1), (33, 1), (16, 1)), (4, 2), (64, 64), 16, layers=2),
    _small("mixed", ((20, 1), (45, 21), (7, 7), (50, 3)), (4, 2), (128, 128), 16, spare=3),
    _small("empty_rows", ((9, 1), (0, 0), (30, 0), (12, 5), (0, 0)), (2, 1), (64, 64), 16, spare=4),
    _small("nothing_read", ((0, 1), (3, 3), (0, 4)), (2, 1), (64, 64), 16),
    _small("shorter_than_the_chunk", ((2, 5), (5, 2)), (2, 1), (128, 128), 16),
    _small("chunk_from_the_start", ((40, 40),), (6, 2), (80, 80), 32, width=256),
    _small("many_windows", ((30, 30), (70, 40), (5, 1)), (4, 4), (64, 64), 16, layers=2),
    _small("window", ((60, 20), (31, 1), (80, 2)), (4, 1), (96, 96), 16, width=256, window=18),
    _small(
        "softcap_sinks_alibi",
        ((11, 3), (0, 0), (40, 1)),
        (4, 4),
        (128, 64),
        16,
        width=256,
        softcap=4.0,
        sinks=per_head,
        alibi_slopes=per_head,
    ),
    _small("sink_alone", ((0, 2), (5, 1)), (2, 2), (64, 64), 16, sinks=per_head),
    _small(
        "trees",
        ((9, 5), (34, 3), (30, 12)),
        (4, 2),
        (64, 64),
        16,
        tree=5,
        ancestor_mask=trees,
        alibi_slopes=per_head,
    ),
    _small("trees_window", ((9, 5), (34, 5)), (4, 2), (64, 64), 16, tree=5, ancestor_mask=trees, window=8),
    _small("latent", ((37, 1), (20, 6)), (6, 1), (160, 128), 16, width=256, latent=True),
    _small("latent_int8", ((37, 1), (20, 6)), (4, 1), (160, 128), 32, width=256, latent=True, cache="int8"),
    _small("runs", ((200, 1), (64, 9)), (4, 2), (64, 64), 16, runs=True, layers=2),
    _small("int8", ((33, 2), (50, 1), (70, 20)), (4, 2), (64, 64), 32, layers=2, cache="int8", window=40),
    _small("int8_page_16", ((33, 2), (130, 1)), (4, 2), (128, 128), 16, cache="int8"),
    _small("int8_page_64", ((130, 2), (50, 1)), (2, 2), (128, 128), 64, cache="int8"),
    _small("float8", ((33, 2), (50, 1)), (4, 2), (64, 64), 32, cache="float8_e4m3fn"),
    _small("bfloat16", ((33, 2), (50, 1), (40, 30)), (8, 2), (256, 256), 16, dtype="bfloat16", cache="bfloat16"),
    _small("bfloat16_int8", ((33, 2), (50, 1)), (8, 2), (64, 64), 32, dtype="bfloat16", cache="int8"),
    _small("bfloat16_bits", ((33, 2), (50, 1)), (4, 2), (64, 64), 16, cache="uint16"),
)


def _decode(context: int, batch: int) -> tuple[tuple[int, int], ...]:
    return ((context, 1),) * batch


PAGES_FIT = 10 << 30  # bytes, on every chip; more rows than that share pages

# 31 rows that decode and one that reads a chunk of its prompt.
MIXED = (*(_decode(4096, 31)), (2048, 512))


def _model(
    name: str, label: str, rows: tuple[tuple[int, int], ...], ways: int = 1, cache: str = "bfloat16", page: int = 64
) -> Case:
    shape = SHAPES[name].shard(ways)
    latent = name == "deepseek-v3-latent"
    width = shape.head_dim if latent else shape.head_dim + shape.value_dim
    width = -(-width // 128) * 128
    physical = PAGES_FIT // (2 * shape.kv_heads * page * width * (1 if cache == "int8" else 2))
    ends = ("" if ways == 1 else f"-shard{ways}") + ("" if page == 64 else f"-page{page}")
    return Case(
        f"{name}-{label}{ends}" + ("" if cache == "bfloat16" else f"-{cache}"),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.value_dim,
        page,
        rows,
        "bfloat16",
        cache,
        2,
        width,
        latent,
        physical=physical,
        options=MappingProxyType({} if shape.window is None else {"window": shape.window}),
        arrays=MappingProxyType({"sinks": per_head} if shape.sinks else {}),
    )


# Latents hold their one head whole on every chip; the absorbed form is what pages serve, not deepseek-v3's heads.
NAMES = tuple(name for name in SHAPES if name != "deepseek-v3")
MODELS = (
    *(
        _model(name, f"decode-{context // 1024}k-batch{batch}", _decode(context, batch), ways, cache)
        for name in NAMES
        for batch in (1, 32, 256)
        for context in (4096, 32768)
        for ways in (1, 8)
        for cache in ("bfloat16", "int8")
    ),
    *(
        _model(name, "mixed-4k", MIXED, ways, cache)
        for name in NAMES
        for ways in (1, 8)
        for cache in ("bfloat16", "int8")
    ),
    *(_model(name, "prefill-4k", ((4096, 4096),), ways) for name in NAMES for ways in (1, 8)),
    *(_model("llama3-8b", "decode-4k-batch32", _decode(4096, 32), 1, "bfloat16", page) for page in (16, 128, 256)),
    *(_model("llama3-70b", "verify-4k-batch32", ((4096, 5),) * 32, ways) for ways in (1, 8)),
    *(
        replace(
            _model("llama3-8b", "decode", tuple((1024 + 8 * row, 1) for row in range(128)), page=page),
            name=f"heads8-4-decode-1k-2k-batch128-page{page}" + ("-runs" if runs else ""),
            heads=8,
            kv_heads=4,
            runs=runs,
        )
        for page in (64, 128, 256)
        for runs in (False, True)
    ),
)
