"""Llama and what differs from it by a switch or two."""

from __future__ import annotations

from dataclasses import replace

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families.readers import NONLINEARITIES, Family, context, decoder, each, heads, rope, windows
from jaxinf.checkpoint.names import Names, blocks, halves
from jaxinf.layers import FFNSpec, Gated, LayerSpec, QKNormSpec, RMSNormSpec
from jaxinf.models import ModelSpec

ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
FFN = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
TOP = {"embed": "embed_tokens", "final_norm": "norm"}
PRE_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

NAMES = Names("layers.{i}.", TOP, {**ATTENTION, **FFN, **PRE_NORMS})
POST_NORMED = replace(
    NAMES,
    layer={
        **ATTENTION,
        **FFN,
        "attention_post_norm": "post_attention_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
)
FUSED = replace(NAMES, layer={**NAMES.layer, **blocks("self_attn.qkv_proj"), **halves("mlp.gate_up_proj")})


def rms(cfg: Config, default: float = 1e-6, **more: float) -> RMSNormSpec:
    return RMSNormSpec(cfg.float("rms_norm_eps", default=default), **more)


def gated(cfg: Config, width: int | None = None, *, bias: bool = False) -> FFNSpec:
    activation = Gated(cfg.choose(NONLINEARITIES, "hidden_act", default="silu"))
    return FFNSpec(cfg.int("intermediate_size") if width is None else width, activation, bias)


def depth(cfg: Config) -> int:
    return cfg.int("num_hidden_layers")


def llama(cfg: Config) -> ModelSpec:
    attention, layer = _llama(cfg)
    cfg.only("is_llama_config", True)
    return decoder(cfg, each(layer, [attention] * depth(cfg)), tied=False, final_norm=layer.norm)


def _llama(cfg: Config):
    """The attention and the layer of a Llama, biases included."""
    bias = cfg.bool("attention_bias", default=False)
    attention = heads(cfg)
    attention = replace(attention, rope=rope(cfg, attention.head_dim), qkv_bias=bias, out_bias=bias)
    norm = rms(cfg)
    return attention, LayerSpec(attention, gated(cfg, bias=cfg.bool("mlp_bias", default=False)), norm)


def mistral(cfg: Config) -> ModelSpec:
    attention = heads(cfg)
    window = cfg.int("sliding_window", default=None)
    attention = replace(attention, rope=rope(cfg, attention.head_dim), window=window)
    norm = rms(cfg)
    layers = each(LayerSpec(attention, gated(cfg), norm), [attention] * depth(cfg))
    return decoder(cfg, layers, tied=False, final_norm=norm)


def granite(cfg: Config) -> ModelSpec:
    attention, layer = _llama(cfg)
    attention = replace(attention, scale=cfg.float("attention_multiplier", default=1.0))
    layer = replace(layer, residual_scale=cfg.float("residual_multiplier", default=1.0))
    return decoder(
        cfg,
        each(layer, [attention] * depth(cfg)),
        tied=False,
        final_norm=layer.norm,
        embed_scale=cfg.float("embedding_multiplier", default=1.0),
        logit_scale=1.0 / cfg.float("logits_scaling", default=1.0),
    )


def smollm3(cfg: Config) -> ModelSpec:
    bias = cfg.bool("attention_bias", default=False)
    attention = heads(cfg)
    rotary = rope(cfg, attention.head_dim, theta=2_000_000.0)
    norm, n = rms(cfg), depth(cfg)
    every = cfg.int("no_rope_layer_interval", default=4)
    turned = cfg.list("no_rope_layers", int, default=[int((i + 1) % every != 0) for i in range(n)])
    if len(turned) != n:
        raise cfg.refuse("no_rope_layers", f"must have {n} entries, one for each layer (1: rope)")
    slides = cfg.bool("use_sliding_window", default=False)
    cfg.ignore("max_window_layers")
    attentions = [
        replace(attention, rope=rotary if turns else None, window=window, qkv_bias=bias, out_bias=bias)
        for turns, window in zip(turned, windows(cfg, n, lambda i: slides and not turned[i]), strict=True)
    ]
    layer = LayerSpec(attention, gated(cfg, bias=cfg.bool("mlp_bias", default=False)), norm)
    return decoder(cfg, each(layer, attentions), tied=True, final_norm=norm)


def phi3(cfg: Config) -> ModelSpec:
    attention = heads(cfg)
    window = cfg.int("sliding_window", default=None)
    attention = replace(attention, rope=rope(cfg, attention.head_dim), window=window)
    norm = rms(cfg, 1e-5)
    for key in ("full_attn_mod", "interpolate_factor"):
        cfg.only(key, 1)
    layers = each(LayerSpec(attention, gated(cfg), norm), [attention] * depth(cfg))
    return decoder(cfg, layers, tied=False, final_norm=norm, context_length=context(cfg, 4096))


def olmo2(cfg: Config) -> ModelSpec:
    attention, layer = _llama(cfg)
    norm = rms(cfg, 1e-5)
    attention = replace(attention, qk_norm=QKNormSpec(norm, "width"))
    layer = replace(layer, norm=norm, placement="post")
    return decoder(cfg, each(layer, [attention] * depth(cfg)), tied=False, final_norm=norm)


FAMILIES = {
    "llama": Family(llama, lambda spec: NAMES),
    "mistral": Family(mistral, lambda spec: NAMES),
    "granite": Family(granite, lambda spec: NAMES),
    "smollm3": Family(smollm3, lambda spec: NAMES),
    "phi3": Family(phi3, lambda spec: FUSED),
    "olmo2": Family(olmo2, lambda spec: POST_NORMED),
}
