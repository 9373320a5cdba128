"""Llama and its kin: every layer the same, gated, pre-normed unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jaxinf.layers import (
    AttentionSpec,
    FFNSpec,
    LayerSpec,
    Llama3RopeSpec,
    QKNormSpec,
    RMSNormSpec,
    RopeSpec,
)
from jaxinf.models.spec import ModelSpec, Segment


def uniform(
    *,
    vocab: int,
    d_model: int,
    depth: int,
    heads: int,
    kv_heads: int,
    width: int,
    context: int,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    rope: RopeSpec | None = None,
    eps: float = 1e-5,
    tied: bool = False,
    **attention,
) -> ModelSpec:
    """A Llama of these sizes; `attention` holds further fields of `AttentionSpec`."""
    dim = head_dim or d_model // heads
    turn = RopeSpec(dim, theta) if rope is None else replace(rope, dim=dim)
    norm = RMSNormSpec(eps)
    layer = LayerSpec(AttentionSpec(heads, kv_heads, dim, rope=turn, **attention), FFNSpec(width), norm)
    return ModelSpec(vocab, d_model, (Segment((layer,), depth),), context, norm, tied)


def _llama3(factor: float, **sizes) -> ModelSpec:
    rope = Llama3RopeSpec(2, 500_000.0, factor=factor)
    return uniform(vocab=128_256, context=131_072, rope=rope, **sizes)


def _qwen25(**sizes) -> ModelSpec:
    return uniform(theta=1e6, eps=1e-6, qkv_bias=True, **sizes)


def _qwen3(**sizes) -> ModelSpec:
    norm = QKNormSpec(RMSNormSpec(1e-6), "head")
    return uniform(vocab=151_936, context=40_960, head_dim=128, theta=1e6, eps=1e-6, qk_norm=norm, **sizes)


def _olmo2(**sizes) -> ModelSpec:
    norm = RMSNormSpec(1e-6)
    spec = uniform(eps=1e-6, theta=500_000.0, qk_norm=QKNormSpec(norm, "width"), **sizes)
    (segment,) = spec.segments
    layer = replace(segment.period[0], placement="post")
    return replace(spec, segments=(Segment((layer,), segment.repeats),))


PRESETS: dict[str, Callable[[], ModelSpec]] = {
    "llama-2-7b": partial(
        uniform, vocab=32_000, d_model=4096, depth=32, heads=32, kv_heads=32, width=11_008, context=4096
    ),
    "llama-3.1-8b": partial(_llama3, 8.0, d_model=4096, depth=32, heads=32, kv_heads=8, width=14_336),
    "llama-3.1-70b": partial(_llama3, 8.0, d_model=8192, depth=80, heads=64, kv_heads=8, width=28_672),
    "llama-3.1-405b": partial(_llama3, 8.0, d_model=16_384, depth=126, heads=128, kv_heads=8, width=53_248),
    "llama-3.2-1b": partial(_llama3, 32.0, d_model=2048, depth=16, heads=32, kv_heads=8, width=8192, tied=True),
    "llama-3.2-3b": partial(
        _llama3, 32.0, d_model=3072, depth=28, heads=24, kv_heads=8, width=8192, head_dim=128, tied=True
    ),
    "mistral-7b-v0.3": partial(
        uniform,
        vocab=32_768,
        d_model=4096,
        depth=32,
        heads=32,
        kv_heads=8,
        width=14_336,
        context=32_768,
        theta=1e6,
    ),
    "qwen2.5-0.5b": partial(
        _qwen25,
        vocab=151_936,
        d_model=896,
        depth=24,
        heads=14,
        kv_heads=2,
        width=4864,
        context=32_768,
        tied=True,
    ),
    "qwen2.5-7b": partial(
        _qwen25, vocab=152_064, d_model=3584, depth=28, heads=28, kv_heads=4, width=18_944, context=131_072
    ),
    "qwen3-0.6b": partial(_qwen3, d_model=1024, depth=28, heads=16, kv_heads=8, width=3072, tied=True),
    "qwen3-8b": partial(_qwen3, d_model=4096, depth=36, heads=32, kv_heads=8, width=12_288),
    "qwen3-32b": partial(_qwen3, d_model=5120, depth=64, heads=64, kv_heads=8, width=25_600),
    "phi-3-mini": partial(
        uniform,
        vocab=32_064,
        d_model=3072,
        depth=32,
        heads=32,
        kv_heads=32,
        width=8192,
        context=4096,
        window=2047,
    ),
    "olmo2-7b": partial(
        _olmo2, vocab=100_352, d_model=4096, depth=32, heads=32, kv_heads=32, width=11_008, context=4096
    ),
    "smollm2-135m": partial(
        uniform,
        vocab=49_152,
        d_model=576,
        depth=30,
        heads=9,
        kv_heads=3,
        width=1536,
        context=8192,
        theta=100_000.0,
        tied=True,
    ),
}
