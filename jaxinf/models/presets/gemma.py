"""Gemma 2 and 3: windows and full layers in turn, norms before and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from jaxinf.layers import (
    AttentionSpec,
    FFNSpec,
    Gated,
    LayerSpec,
    LinearRopeSpec,
    QKNormSpec,
    RMSNormSpec,
    RopeSpec,
)
from jaxinf.models.spec import ModelSpec, fold

_NORM = RMSNormSpec(1e-6, offset=1.0)


def _model(vocab: int, d_model: int, width: int, context: int, attentions: list[AttentionSpec], cap=None):
    ffn = FFNSpec(width, Gated("gelu_tanh"))
    layers = [LayerSpec(a, ffn, _NORM, "sandwich") for a in attentions]
    scale = math.sqrt(d_model)
    return ModelSpec(vocab, d_model, fold(layers), context, _NORM, tied=True, embed_scale=scale, logit_softcap=cap)


def _gemma2(*, d_model: int, depth: int, heads: int, kv_heads: int, width: int, head_dim=256, scalar=256.0):
    def attention(i: int) -> AttentionSpec:
        window = 4096 if i % 2 == 0 else None
        turn = RopeSpec(head_dim)
        return AttentionSpec(heads, kv_heads, head_dim, rope=turn, window=window, scale=scalar**-0.5, softcap=50.0)

    return _model(256_000, d_model, width, 8192, [attention(i) for i in range(depth)], cap=30.0)


def _gemma3(
    *,
    vocab: int = 262_208,
    d_model: int,
    depth: int,
    heads: int,
    kv_heads: int,
    width: int,
    head_dim: int = 256,
    scalar: float = 256.0,
    window: int = 1024,
    factor: float | None = 8.0,
    context: int = 131_072,
):
    wide = RopeSpec(head_dim, 1e6) if factor is None else LinearRopeSpec(head_dim, 1e6, factor=factor)
    local = RopeSpec(head_dim, 10_000.0)

    def attention(i: int) -> AttentionSpec:
        slides = (i + 1) % 6 != 0
        return AttentionSpec(
            heads,
            kv_heads,
            head_dim,
            rope=local if slides else wide,
            window=window if slides else None,
            qk_norm=QKNormSpec(_NORM, "head"),
            scale=scalar**-0.5,
        )

    return _model(vocab, d_model, width, context, [attention(i) for i in range(depth)])


PRESETS: dict[str, Callable[[], ModelSpec]] = {
    "gemma-2-2b": partial(_gemma2, d_model=2304, depth=26, heads=8, kv_heads=4, width=9216),
    "gemma-2-9b": partial(_gemma2, d_model=3584, depth=42, heads=16, kv_heads=8, width=14_336),
    "gemma-2-27b": partial(
        _gemma2, d_model=4608, depth=46, heads=32, kv_heads=16, width=36_864, head_dim=128, scalar=144.0
    ),
    "gemma-3-1b": partial(
        _gemma3,
        vocab=262_144,
        d_model=1152,
        depth=26,
        heads=4,
        kv_heads=1,
        width=6912,
        window=512,
        factor=None,
        context=32_768,
    ),
    "gemma-3-4b": partial(_gemma3, d_model=2560, depth=34, heads=8, kv_heads=4, width=10_240),
    "gemma-3-12b": partial(_gemma3, d_model=3840, depth=48, heads=16, kv_heads=8, width=15_360),
    "gemma-3-27b": partial(
        _gemma3, d_model=5376, depth=62, heads=32, kv_heads=16, width=21_504, head_dim=128, scalar=168.0
    ),
}
