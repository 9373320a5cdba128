"""Gemma 1 to 3: norms about one, scaled embeddings, soft caps, windows with a rope of their own."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families.llama import ATTENTION, FFN, NAMES, depth, rms
from jaxinf.checkpoint.families.readers import (
    FULL,
    NONLINEARITIES,
    SLIDING,
    Family,
    context,
    decoder,
    each,
    heads,
    rope,
    windows,
)
from jaxinf.layers import AttentionSpec, FFNSpec, Gated, LayerSpec, QKNormSpec, RopeSpec
from jaxinf.models import ModelSpec

SANDWICHED = replace(
    NAMES,
    layer={
        **ATTENTION,
        **FFN,
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
)
# The text half of a model of images too; older files put `model.` inside, newer ones outside.
MULTIMODAL = replace(
    SANDWICHED,
    prefixes=("language_model.model.", "model.language_model.", "model."),
    head="language_model.lm_head",
    buffers=SANDWICHED.buffers + r"|(vision_tower|multi_modal_projector)\..*|lm_head\.weight",
)


def gemma(cfg: Config) -> ModelSpec:
    bias = cfg.bool("attention_bias", default=False)
    attention = heads(cfg, head_dim=256)
    attention = replace(attention, rope=rope(cfg, attention.head_dim), qkv_bias=bias, out_bias=bias)
    cfg.only("use_bidirectional_attention", False)
    # Old files say "gelu" and mean its tanh form.
    name = cfg.str("hidden_activation", "hidden_act", default="gelu")
    function = "gelu_tanh" if name == "gelu" else cfg.choose(NONLINEARITIES, "hidden_activation", "hidden_act")
    norm = rms(cfg, offset=1.0)
    layer = LayerSpec(attention, FFNSpec(cfg.int("intermediate_size"), Gated(function)), norm)
    return _decoder(cfg, layer, [attention] * depth(cfg))


def gemma2(cfg: Config) -> ModelSpec:
    attention, layer = _sandwiched(cfg)
    attention = replace(attention, rope=rope(cfg, attention.head_dim), softcap=_cap(cfg, "attn_logit", 50.0))
    sizes = windows(cfg, depth(cfg), lambda i: i % 2 == 0, default=4096)
    attentions = [replace(attention, window=w) for w in sizes]
    return _decoder(cfg, layer, attentions, logit_softcap=_cap(cfg, "final_logit", 30.0))


def gemma3(cfg: Config) -> ModelSpec:
    attention, layer = _sandwiched(cfg)
    attention = replace(attention, qk_norm=QKNormSpec(layer.norm, "head"), softcap=_cap(cfg, "attn_logit", None))
    every = cfg.int("sliding_window_pattern", "_sliding_window_pattern", default=6)
    sizes = windows(cfg, depth(cfg), lambda i: (i + 1) % every != 0, default=4096)
    wide, local = _two_ropes(cfg, attention.head_dim)
    attentions = [replace(attention, window=w, rope=wide if w is None else local) for w in sizes]
    return _decoder(
        cfg,
        layer,
        attentions,
        logit_softcap=_cap(cfg, "final_logit", None),
        context_length=context(cfg, 131_072),
    )


def _two_ropes(cfg: Config, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    def local(section: Config) -> RopeSpec:
        return rope(cfg, head_dim, theta=10_000.0, theta_key="rope_local_base_freq", section=section)

    if "rope_parameters" not in cfg:
        wide = rope(cfg, head_dim, theta=1e6)
        return wide, local(Config({}, "rope"))
    both = cfg.section("rope_parameters")
    wide = rope(cfg, head_dim, theta=1e6, section=both.section(FULL))
    return wide, local(both.section(SLIDING))


def multimodal(cfg: Config) -> ModelSpec:
    """The text half alone."""
    cfg.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    cfg.ignore("boi_token_id", "eoi_token_id", "image_token_id")
    text = cfg.section("text_config")
    text.only("model_type", "gemma3_text")
    tied = cfg.bool("tie_word_embeddings", default=True)
    spec = gemma3(_with_defaults(text))
    return replace(spec, tied=tied and spec.tied)


def _with_defaults(text: Config) -> Config:
    # Files of these models leave out what equals the defaults of the library that wrote them.
    text.default(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
    return text


def _sandwiched(cfg: Config) -> tuple[AttentionSpec, LayerSpec]:
    bias = cfg.bool("attention_bias", default=False)
    cfg.only("use_bidirectional_attention", False)
    cfg.ignore("hidden_act", "sliding_window_size")  # `hidden_activation` and `sliding_window` count
    scale = cfg.float("query_pre_attn_scalar", default=256.0) ** -0.5
    attention = replace(heads(cfg, head_dim=256), scale=scale, qkv_bias=bias, out_bias=bias)
    function = cfg.choose(NONLINEARITIES, "hidden_activation", default="gelu_pytorch_tanh")
    ffn = FFNSpec(cfg.int("intermediate_size"), Gated(function))
    return attention, LayerSpec(attention, ffn, rms(cfg, offset=1.0), "sandwich")


def _cap(cfg: Config, what: str, default: float | None) -> float | None:
    """A soft cap; null means none, where a key that is absent means the default."""
    return cfg.float(f"{what}_softcapping", default=None if cfg.null(f"{what}_softcapping") else default)


def _decoder(cfg: Config, layer: LayerSpec, attentions: list[AttentionSpec], **more) -> ModelSpec:
    scale = math.sqrt(cfg.int("hidden_size"))
    layers = each(layer, attentions)
    return decoder(cfg, layers, tied=True, final_norm=layer.norm, embed_scale=scale, **more)


FAMILIES = {
    "gemma": Family(gemma, lambda spec: NAMES),
    "gemma2": Family(gemma2, lambda spec: SANDWICHED),
    "gemma3_text": Family(gemma3, lambda spec: SANDWICHED),
    "gemma3": Family(multimodal, lambda spec: MULTIMODAL),
}
