"""Mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxinf.layers import (
    AttentionSpec,
    ClampedGated,
    LayerSpec,
    MoESpec,
    QKNormSpec,
    RMSNormSpec,
    RopeSpec,
    TokenChoice,
    YarnRopeSpec,
)
from jaxinf.models.spec import ModelSpec, Segment


def _mixtral(*, d_model: int, depth: int, heads: int, width: int, context: int, vocab: int) -> ModelSpec:
    norm = RMSNormSpec(1e-5)
    attention = AttentionSpec(heads, 8, 128, rope=RopeSpec(128, 1e6))
    layer = LayerSpec(attention, MoESpec(8, width, TokenChoice(top_k=2)), norm)
    return ModelSpec(vocab, d_model, (Segment((layer,), depth),), context, norm)


def _qwen3(*, d_model: int, depth: int, heads: int, width: int) -> ModelSpec:
    norm = RMSNormSpec(1e-6)
    attention = AttentionSpec(heads, 4, 128, rope=RopeSpec(128, 1e6), qk_norm=QKNormSpec(norm, "head"))
    layer = LayerSpec(attention, MoESpec(128, width, TokenChoice(top_k=8)), norm)
    return ModelSpec(151_936, d_model, (Segment((layer,), depth),), 40_960, norm)


def _olmoe() -> ModelSpec:
    norm = RMSNormSpec(1e-5)
    attention = AttentionSpec(16, 16, 128, rope=RopeSpec(128), qk_norm=QKNormSpec(norm, "width"))
    layer = LayerSpec(attention, MoESpec(64, 1024, TokenChoice(top_k=8, normalise=False)), norm)
    return ModelSpec(50_304, 2048, (Segment((layer,), 16),), 4096, norm)


def _gpt_oss(*, experts: int, depth: int) -> ModelSpec:
    norm = RMSNormSpec(1e-5)
    rope = YarnRopeSpec(64, 150_000.0, factor=32.0, original_max=4096, truncate=False)
    mixture = MoESpec(experts, 2880, TokenChoice(bias=True, top_k=4), ClampedGated(), bias=True)

    def layer(window: int | None) -> LayerSpec:
        attention = AttentionSpec(64, 8, 64, rope=rope, window=window, sinks=True, qkv_bias=True, out_bias=True)
        return LayerSpec(attention, mixture, norm)

    return ModelSpec(201_088, 2880, (Segment((layer(128), layer(None)), depth // 2),), 131_072, norm)


PRESETS: dict[str, Callable[[], ModelSpec]] = {
    "mixtral-8x7b": partial(_mixtral, d_model=4096, depth=32, heads=32, width=14_336, context=32_768, vocab=32_000),
    "mixtral-8x22b": partial(
        _mixtral, d_model=6144, depth=56, heads=48, width=16_384, context=65_536, vocab=32_768
    ),
    "qwen3-30b-a3b": partial(_qwen3, d_model=2048, depth=48, heads=32, width=768),
    "qwen3-235b-a22b": partial(_qwen3, d_model=4096, depth=94, heads=64, width=1536),
    "olmoe-1b-7b": _olmoe,
    "gpt-oss-20b": partial(_gpt_oss, experts=32, depth=24),
    "gpt-oss-120b": partial(_gpt_oss, experts=128, depth=36),
}
