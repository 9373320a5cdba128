"""Families whose every layer is a mixture of experts: Mixtral, OLMoE, GPT-OSS."""

from __future__ import annotations

from dataclasses import replace

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families.llama import ATTENTION, NAMES, depth, rms
from jaxinf.checkpoint.families.qwen import SPARSE
from jaxinf.checkpoint.families.readers import NONLINEARITIES, Family, decoder, each, heads, rope, windows
from jaxinf.checkpoint.names import Tensor, experts
from jaxinf.layers import ClampedGated, Gated, LayerSpec, MoESpec, QKNormSpec, TokenChoice, YarnRopeSpec
from jaxinf.models import ModelSpec

MIXTRAL = replace(
    NAMES,
    layer={**NAMES.layer, "ffn.router": "block_sparse_moe.gate"},
    tensors={
        "ffn.experts.gate": experts("block_sparse_moe.experts.{j}.w1.weight"),
        "ffn.experts.up": experts("block_sparse_moe.experts.{j}.w3.weight"),
        "ffn.experts.down": experts("block_sparse_moe.experts.{j}.w2.weight"),
    },
)
# Gate and up alternate in the last axis.
GPT_OSS = replace(
    NAMES,
    layer={**NAMES.layer, **ATTENTION, "ffn.router": "mlp.router"},
    tensors={
        "attention.sinks": Tensor("self_attn.sinks"),
        "ffn.experts.gate": Tensor("mlp.experts.gate_up_proj", lambda x: x[..., 0::2]),
        "ffn.experts.up": Tensor("mlp.experts.gate_up_proj", lambda x: x[..., 1::2]),
        "ffn.experts.down": Tensor("mlp.experts.down_proj"),
        "ffn.experts.gate_bias": Tensor("mlp.experts.gate_up_proj_bias", lambda x: x[..., 0::2]),
        "ffn.experts.up_bias": Tensor("mlp.experts.gate_up_proj_bias", lambda x: x[..., 1::2]),
        "ffn.experts.down_bias": Tensor("mlp.experts.down_proj_bias"),
    },
)


def mixtral(cfg: Config) -> ModelSpec:
    attention = heads(cfg)
    window = cfg.int("sliding_window", default=None)
    attention = replace(attention, rope=rope(cfg, attention.head_dim, theta=1e6), window=window)
    norm = rms(cfg, 1e-5)
    mixture = MoESpec(
        cfg.int("num_local_experts", "num_experts", default=8),
        cfg.int("intermediate_size"),
        TokenChoice(top_k=cfg.int("num_experts_per_tok", default=2)),
        Gated(cfg.choose(NONLINEARITIES, "hidden_act", default="silu")),
    )
    layers = each(LayerSpec(attention, mixture, norm), [attention] * depth(cfg))
    return decoder(cfg, layers, tied=False, final_norm=norm)


def olmoe(cfg: Config) -> ModelSpec:
    bias = cfg.bool("attention_bias", default=False)
    attention, norm = heads(cfg), rms(cfg, 1e-5)
    attention = replace(
        attention,
        rope=rope(cfg, attention.head_dim),
        qk_norm=QKNormSpec(norm, "width"),
        clip=cfg.float("clip_qkv", default=None),
        qkv_bias=bias,
        out_bias=bias,
    )
    mixture = MoESpec(
        cfg.int("num_experts", "num_local_experts", default=64),
        cfg.int("intermediate_size"),
        TokenChoice(
            top_k=cfg.int("num_experts_per_tok", default=8), normalise=cfg.bool("norm_topk_prob", default=False)
        ),
        Gated(cfg.choose(NONLINEARITIES, "hidden_act", default="silu")),
    )
    layers = each(LayerSpec(attention, mixture, norm), [attention] * depth(cfg))
    return decoder(cfg, layers, tied=False, final_norm=norm)


def gpt_oss(cfg: Config) -> ModelSpec:
    attention, norm = heads(cfg, head_dim=64), rms(cfg, 1e-5)
    bias = cfg.bool("attention_bias", default=True)
    if "rope_parameters" in cfg or "rope_scaling" in cfg:
        rotary = rope(cfg, attention.head_dim, theta=150_000.0)
    else:
        theta = cfg.float("rope_theta", default=150_000.0)
        rotary = YarnRopeSpec(attention.head_dim, theta, factor=32.0, original_max=4096, truncate=False)
    attention = replace(attention, rope=rotary, sinks=True, qkv_bias=bias, out_bias=bias)
    mixture = MoESpec(
        cfg.int("num_local_experts", "num_experts"),
        cfg.int("intermediate_size"),
        TokenChoice(bias=True, top_k=cfg.int("num_experts_per_tok", "experts_per_token", default=4)),
        ClampedGated(alpha=cfg.float("swiglu_alpha", default=1.702), limit=cfg.float("swiglu_limit", default=7.0)),
        bias=True,
    )
    cfg.only("hidden_act", "silu")
    cfg.ignore("initial_context_length")  # the rope's original length says it
    sizes = windows(cfg, depth(cfg), lambda i: i % 2 == 0, default=128)
    layers = each(LayerSpec(attention, mixture, norm), [replace(attention, window=w) for w in sizes])
    return decoder(cfg, layers, tied=False, final_norm=norm)


FAMILIES = {
    "mixtral": Family(mixtral, lambda spec: MIXTRAL),
    "olmoe": Family(olmoe, lambda spec: SPARSE),
    "gpt_oss": Family(gpt_oss, lambda spec: GPT_OSS),
}
