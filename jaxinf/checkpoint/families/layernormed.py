"""Rotary families with LayerNorm: Cohere, StarCoder2, StableLM, GPT-NeoX."""

from __future__ import annotations

from dataclasses import replace

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families.llama import ATTENTION, FFN, NAMES, depth, gated
from jaxinf.checkpoint.families.readers import NONLINEARITIES, Family, decoder, each, heads, rope, windows
from jaxinf.checkpoint.names import Names, Part, grouped, key_heads, query_heads
from jaxinf.layers import AttentionSpec, FFNSpec, LayerNormSpec, LayerSpec, Plain, QKNormSpec
from jaxinf.models import ModelSpec

ONE_NORM = replace(NAMES, layer={**ATTENTION, **FFN, "attention_norm": "input_layernorm"})
STARCODER2 = replace(NAMES, layer={**NAMES.layer, "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"})
STABLELM = replace(
    NAMES,
    layer={
        **NAMES.layer,
        "attention.query_norm": Part("self_attn.q_layernorm.norms.{j}", count=query_heads),
        "attention.key_norm": Part("self_attn.k_layernorm.norms.{j}", count=key_heads),
    },
)
GPT_NEOX = Names(
    "layers.{i}.",
    {"embed": "embed_in", "final_norm": "final_layer_norm"},
    {
        **grouped("attention.query_key_value"),
        "attention.out": "attention.dense",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    },
    prefixes=("gpt_neox.", ""),
    head="embed_out",
    buffers=NAMES.buffers + r"|attention\.bias",
)


def cohere(cfg: Config) -> ModelSpec:
    norm = LayerNormSpec(cfg.float("layer_norm_eps", default=1e-5), bias=False)
    attention = heads(cfg)
    rotary = rope(cfg, attention.head_dim, theta=500_000.0, interleaved=True)
    qk = QKNormSpec(norm, "heads") if cfg.bool("use_qk_norm", default=False) else None
    attention = replace(attention, rope=rotary, qk_norm=qk)
    return _cohere(cfg, norm, [attention] * depth(cfg))


def cohere2(cfg: Config) -> ModelSpec:
    norm = LayerNormSpec(cfg.float("layer_norm_eps", default=1e-5), bias=False)
    attention = heads(cfg)
    rotary = rope(cfg, attention.head_dim, interleaved=True)
    cfg.only("order_of_interleaved_layers", "local_attn_first")
    cfg.only("position_embedding_type", "rope_gptj")
    cfg.only("rotary_pct", 1.0)
    cfg.only("use_gated_activation", True)
    cfg.only("use_parallel_block", True)
    cfg.ignore("use_embedding_sharing", "use_parallel_embedding")
    every = cfg.int("sliding_window_pattern", default=4)
    sizes = windows(cfg, depth(cfg), lambda i: (i + 1) % every != 0, default=4096)
    # Layers that see everything do not turn.
    attentions = [replace(attention, window=w, rope=None if w is None else rotary) for w in sizes]
    return _cohere(cfg, norm, attentions)


def _cohere(cfg: Config, norm: LayerNormSpec, attentions: list[AttentionSpec]) -> ModelSpec:
    bias = cfg.bool("attention_bias", default=False)
    attentions = [replace(a, qkv_bias=bias, out_bias=bias) for a in attentions]
    layer = LayerSpec(attentions[0], gated(cfg), norm, "parallel")
    scale = cfg.float("logit_scale", default=0.0625)
    return decoder(cfg, each(layer, attentions), tied=True, final_norm=norm, logit_scale=scale)


def starcoder2(cfg: Config) -> ModelSpec:
    norm = LayerNormSpec(cfg.float("norm_epsilon", default=1e-5))
    bias = cfg.bool("use_bias", default=True)
    attention = heads(cfg)
    attention = replace(
        attention,
        rope=rope(cfg, attention.head_dim),
        window=cfg.int("sliding_window", default=None),
        qkv_bias=bias,
        out_bias=bias,
    )
    cfg.only("mlp_type", "default")
    cfg.only("norm_type", "layer_norm")
    cfg.only("scale_attn_weights", True)
    # Older names of what `hidden_act` and `norm_epsilon` say, and float32 where it is float32 here always.
    cfg.ignore("activation_function", "layer_norm_epsilon")
    cfg.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    function = cfg.choose(NONLINEARITIES, "hidden_act", default="gelu_pytorch_tanh")
    layer = LayerSpec(attention, FFNSpec(cfg.int("intermediate_size"), Plain(function), bias), norm)
    return decoder(cfg, each(layer, [attention] * depth(cfg)), tied=True, final_norm=norm)


def stablelm(cfg: Config) -> ModelSpec:
    norm = LayerNormSpec(cfg.float("layer_norm_eps", default=1e-5))
    attention = heads(cfg)
    per_head = LayerNormSpec(norm.eps, bias=False)
    attention = replace(
        attention,
        rope=rope(cfg, attention.head_dim, partial=0.25),
        qkv_bias=cfg.bool("use_qkv_bias", default=False),
        qk_norm=QKNormSpec(per_head, "heads") if cfg.bool("qk_layernorm", default=False) else None,
    )
    placement = "parallel" if cfg.bool("use_parallel_residual", default=False) else "pre"
    layer = LayerSpec(attention, gated(cfg), norm, placement)
    return decoder(cfg, each(layer, [attention] * depth(cfg)), tied=False, final_norm=norm)


def gpt_neox(cfg: Config) -> ModelSpec:
    norm = LayerNormSpec(cfg.float("layer_norm_eps", default=1e-5))
    attention, bias = heads(cfg), cfg.bool("attention_bias", default=True)
    rotary = rope(cfg, attention.head_dim, theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct")
    attention = replace(attention, rope=rotary, qkv_bias=bias, out_bias=bias)
    placement = "parallel_two_norms" if cfg.bool("use_parallel_residual", default=True) else "pre"
    function = cfg.choose(NONLINEARITIES, "hidden_act", default="gelu")
    ffn = FFNSpec(cfg.int("intermediate_size"), Plain(function), bias=True)
    layers = each(LayerSpec(attention, ffn, norm, placement), [attention] * depth(cfg))
    return decoder(cfg, layers, tied=False, final_norm=norm)


FAMILIES = {
    "cohere": Family(cohere, lambda spec: ONE_NORM),
    "cohere2": Family(cohere2, lambda spec: ONE_NORM),
    "starcoder2": Family(starcoder2, lambda spec: STARCODER2),
    "stablelm": Family(stablelm, lambda spec: STABLELM),
    "gpt_neox": Family(gpt_neox, lambda spec: GPT_NEOX),
}
