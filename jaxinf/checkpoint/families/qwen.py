"""Qwen 2 to 3: biased or normalised queries and keys, windows above a layer, mixtures on some layers."""

from __future__ import annotations

from dataclasses import replace

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families.llama import NAMES, depth, gated, rms
from jaxinf.checkpoint.families.readers import NONLINEARITIES, Family, decoder, each, heads, rope, windows
from jaxinf.checkpoint.names import Names, experts
from jaxinf.layers import AttentionSpec, FFNSpec, Gated, LayerSpec, MoESpec, QKNormSpec, TokenChoice
from jaxinf.models import ModelSpec

SPARSE = replace(
    NAMES,
    layer={
        **NAMES.layer,
        "ffn.router": "mlp.gate",
        "ffn.shared.gate": "mlp.shared_expert.gate_proj",
        "ffn.shared.up": "mlp.shared_expert.up_proj",
        "ffn.shared.down": "mlp.shared_expert.down_proj",
        "ffn.shared_gate": "mlp.shared_expert_gate",
    },
    tensors={
        "ffn.experts.gate": experts("mlp.experts.{j}.gate_proj.weight"),
        "ffn.experts.up": experts("mlp.experts.{j}.up_proj.weight"),
        "ffn.experts.down": experts("mlp.experts.{j}.down_proj.weight"),
    },
)


def qwen2(cfg: Config) -> ModelSpec:
    attention = replace(heads(cfg), qkv_bias=True)
    return _dense(cfg, replace(attention, rope=rope(cfg, attention.head_dim)))


def qwen3(cfg: Config) -> ModelSpec:
    return _dense(cfg, _normalised(cfg))


def _normalised(cfg: Config) -> AttentionSpec:
    attention, bias = heads(cfg, head_dim=128), cfg.bool("attention_bias", default=False)
    return replace(
        attention,
        rope=rope(cfg, attention.head_dim),
        qk_norm=QKNormSpec(rms(cfg), "head"),
        qkv_bias=bias,
        out_bias=bias,
    )


def _dense(cfg: Config, attention: AttentionSpec) -> ModelSpec:
    """Layers from `max_window_layers` on slide, if any do."""
    slides = cfg.bool("use_sliding_window", default=False)
    above = cfg.int("max_window_layers", default=28)
    size = windows(cfg, depth(cfg), lambda i: slides and i >= above, default=4096 if slides else None)
    norm = rms(cfg)
    layers = each(LayerSpec(attention, gated(cfg), norm), [replace(attention, window=w) for w in size])
    return decoder(cfg, layers, tied=False, final_norm=norm)


def qwen2_moe(cfg: Config) -> ModelSpec:
    attention = heads(cfg)
    bias = cfg.bool("qkv_bias", default=True)
    attention = replace(attention, rope=rope(cfg, attention.head_dim), qkv_bias=bias)
    shared = gated(cfg, cfg.int("shared_expert_intermediate_size"))
    return _sparse(cfg, attention, shared)


def qwen3_moe(cfg: Config) -> ModelSpec:
    return _sparse(cfg, _normalised(cfg), None)


def _sparse(cfg: Config, attention: AttentionSpec, shared: FFNSpec | None) -> ModelSpec:
    cfg.only("use_sliding_window", False)
    cfg.ignore("max_window_layers", "sliding_window")
    n = depth(cfg)
    windows(cfg, n, lambda i: False)
    mixture = MoESpec(
        cfg.int("num_experts", "num_local_experts"),
        cfg.int("moe_intermediate_size"),
        TokenChoice(top_k=cfg.int("num_experts_per_tok"), normalise=cfg.bool("norm_topk_prob", default=False)),
        Gated(cfg.choose(NONLINEARITIES, "hidden_act", default="silu")),
        shared=shared,
        shared_gate=shared is not None,
    )
    every, dense = cfg.int("decoder_sparse_step", default=1), cfg.list("mlp_only_layers", int, default=[])
    plain, norm = gated(cfg), rms(cfg)
    layers = [
        LayerSpec(attention, mixture if i not in dense and (i + 1) % every == 0 else plain, norm) for i in range(n)
    ]
    return decoder(cfg, layers, tied=False, final_norm=norm)


def _plain(spec: ModelSpec) -> Names:
    return NAMES


def _mixed(spec: ModelSpec) -> Names:
    return SPARSE


FAMILIES = {
    "qwen2": Family(qwen2, _plain),
    "qwen3": Family(qwen3, _plain),
    "qwen2_moe": Family(qwen2_moe, _mixed),
    "qwen3_moe": Family(qwen3_moe, _mixed),
}
