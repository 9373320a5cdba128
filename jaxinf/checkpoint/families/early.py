"""Families of learned positions or linear biases: GPT-2, BLOOM, MPT, and Falcon with its fused heads."""

from __future__ import annotations

from dataclasses import replace

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.families.readers import NONLINEARITIES, Family, context, decoder, each, rope
from jaxinf.checkpoint.names import Names, blocks, grouped
from jaxinf.layers import AlibiSpec, AttentionSpec, FFNSpec, LayerNormSpec, LayerSpec, Plain
from jaxinf.models import ModelSpec

GPT2 = Names(
    "h.{i}.",
    {"embed": "wte", "positions": "wpe", "final_norm": "ln_f"},
    {
        **blocks("attn.c_attn"),
        "attention.out": "attn.c_proj",
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    },
    prefixes=("transformer.", ""),
    transposed=True,
    buffers=r"attn\.bias|masked_bias",
)
BLOOM = Names(
    "h.{i}.",
    {"embed": "word_embeddings", "embed_norm": "word_embeddings_layernorm", "final_norm": "ln_f"},
    {
        **grouped("self_attention.query_key_value"),
        "attention.out": "self_attention.dense",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    },
    prefixes=("transformer.", ""),
)
FALCON_TWO_NORMS = replace(BLOOM, layer={**BLOOM.layer, "attention_norm": "ln_attn", "ffn_norm": "ln_mlp"})
MPT = Names(
    "blocks.{i}.",
    {"embed": "wte", "final_norm": "norm_f"},
    {
        **blocks("attn.Wqkv"),
        "attention.out": "attn.out_proj",
        "attention_norm": "norm_1",
        "ffn_norm": "norm_2",
        "ffn.up": "ffn.up_proj",
        "ffn.down": "ffn.down_proj",
    },
    prefixes=("transformer.", ""),
)


def gpt2(cfg: Config) -> ModelSpec:
    width, n = cfg.int("n_embd"), cfg.int("n_head")
    attention = AttentionSpec(n, n, _head_dim(cfg, "n_embd", width, n), qkv_bias=True, out_bias=True)
    scale = attention.head_dim**-0.5 if cfg.bool("scale_attn_weights", default=True) else 1.0
    by_layer = cfg.bool("scale_attn_by_inverse_layer_idx", default=False)
    scales = [scale / (i + 1) if by_layer else scale for i in range(cfg.int("n_layer"))]
    cfg.only("add_cross_attention", False)
    # Higher precision of the scores (float32 here always), and a classifier's head.
    cfg.ignore("reorder_and_upcast_attn", "n_ctx", "summary_activation", "summary_first_dropout")
    cfg.ignore("summary_proj_to_labels", "summary_type", "summary_use_proj")
    function = cfg.choose(NONLINEARITIES, "activation_function", default="gelu_new")
    ffn = FFNSpec(cfg.int("n_inner", default=4 * width), Plain(function), bias=True)
    norm = LayerNormSpec(cfg.float("layer_norm_epsilon", default=1e-5))
    layers = each(LayerSpec(attention, ffn, norm), [replace(attention, scale=s) for s in scales])
    entries = cfg.int("n_positions", default=1024)
    return decoder(cfg, layers, tied=True, final_norm=norm, learned_positions=entries, context_length=entries)


def bloom(cfg: Config) -> ModelSpec:
    width, n = cfg.int("n_embed", "hidden_size"), cfg.int("n_head", "num_attention_heads")
    attention = AttentionSpec(
        n, n, _head_dim(cfg, "hidden_size", width, n), alibi=AlibiSpec(), qkv_bias=True, out_bias=True
    )
    norm = LayerNormSpec(cfg.float("layer_norm_epsilon", default=1e-5))
    renormed = cfg.bool("apply_residual_connection_post_layernorm", default=False)
    cfg.only("n_inner", 4 * width)
    # How the training code sliced and fused its work.
    cfg.ignore("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi")
    cfg.ignore("skip_bias_add", "skip_bias_add_qkv", "slow_but_exact")
    ffn = FFNSpec(4 * width, Plain("gelu_tanh"), bias=True)
    layer = LayerSpec(attention, ffn, norm, "renormed" if renormed else "pre")
    layers = each(layer, [attention] * cfg.int("n_layer", "num_hidden_layers"))
    length = cfg.int("seq_length", default=2048)
    return decoder(cfg, layers, tied=True, final_norm=norm, embed_norm=norm, context_length=length)


def mpt(cfg: Config) -> ModelSpec:
    width, n = cfg.int("d_model"), cfg.int("n_heads")
    a = cfg.section("attn_config")
    a.only("attn_type", "multihead_attention")
    a.only("prefix_lm", False)
    a.only("qk_ln", False)
    a.only("attn_uses_sequence_id", False)
    a.only("alibi", True)
    a.ignore("attn_impl")
    attention = AttentionSpec(
        n,
        n,
        _head_dim(cfg, "d_model", width, n),
        alibi=AlibiSpec(bias_max=a.float("alibi_bias_max", default=8.0)),
        scale=a.float("softmax_scale", default=None),
        clip=a.float("clip_qkv", default=None),
    )
    cfg.only("no_bias", True)
    cfg.only("norm_type", "low_precision_layernorm", "layernorm")
    cfg.only("expansion_ratio", 4)
    cfg.only("embedding_fraction", 1.0)
    cfg.only("logit_scale", None)
    # With linear biases there is no position table, whatever the key says.
    cfg.ignore("learned_pos_emb", "init_config", "init_device", "verbose", "emb_pdrop")
    norm = LayerNormSpec(cfg.float("layer_norm_epsilon", default=1e-5), bias=False)
    layer = LayerSpec(attention, FFNSpec(4 * width, Plain("gelu")), norm)
    layers = each(layer, [attention] * cfg.int("n_layers"))
    length = cfg.int("max_seq_len", default=2048)
    return decoder(cfg, layers, tied=True, final_norm=norm, context_length=length)


def falcon(cfg: Config) -> ModelSpec:
    width = cfg.int("n_embed", "hidden_size")
    n = cfg.int("num_attention_heads", "n_head")
    new = cfg.bool("new_decoder_architecture", default=False)
    shared, given = cfg.bool("multi_query", default=True), cfg.int("num_kv_heads", "n_head_kv", default=n)
    kv = given if new or not shared else 1
    dim, bias = _head_dim(cfg, "hidden_size", width, n), cfg.bool("bias", default=False)
    attention = AttentionSpec(n, kv, dim, qkv_bias=bias, out_bias=bias)
    if cfg.bool("alibi", default=False):
        # Scores and biases are scaled together.
        attention = replace(attention, alibi=AlibiSpec(scale=dim**-0.5))
        cfg.ignore("rope_parameters", "rope_theta", "rope_scaling")
    else:
        attention = replace(attention, rope=rope(cfg, dim))
    parallel = cfg.bool("parallel_attn", default=True)
    norms = cfg.int("num_ln_in_parallel_attn", default=2 if new else 1)
    if new and not parallel:
        raise cfg.refuse("parallel_attn", "with new_decoder_architecture=True describes no known model")
    if norms not in (1, 2) or (norms == 2 and not new):
        raise cfg.refuse("num_ln_in_parallel_attn", "must be 1, or 2 with new_decoder_architecture=True")
    cfg.only("apply_residual_connection_post_layernorm", False)
    placement = ("pre", "parallel", "parallel_two_norms")[norms if parallel else 0]
    norm = LayerNormSpec(cfg.float("layer_norm_epsilon", default=1e-5))
    function = cfg.choose(NONLINEARITIES, "activation", default="gelu")
    ffn = FFNSpec(cfg.int("ffn_hidden_size", default=4 * width), Plain(function), bias)
    layer = LayerSpec(attention, ffn, norm, placement)
    layers = each(layer, [attention] * cfg.int("num_hidden_layers", "n_layer"))
    return decoder(cfg, layers, tied=True, final_norm=norm, context_length=context(cfg))


def _falcon_names(spec: ModelSpec) -> Names:
    first = next(spec.layers())
    return FALCON_TWO_NORMS if first.placement == "parallel_two_norms" else BLOOM


def _head_dim(cfg: Config, key: str, width: int, n: int) -> int:
    if width % n:
        raise cfg.refuse(key, f"is no multiple of the {n} heads")
    return width // n


FAMILIES = {
    "gpt2": Family(gpt2, lambda spec: GPT2),
    "bloom": Family(bloom, lambda spec: BLOOM),
    "mpt": Family(mpt, lambda spec: MPT),
    "falcon": Family(falcon, _falcon_names),
}
