"""Cases of the families with LayerNorm: learned, rotary and ALiBi positions, fused and transposed weights."""

from typing import Any

from case import BODY, TIED, UNTIED, Case, published

SHAPE = {"embedding_scale": 0.25, "gain": 1.5}
"""For tied heads, which else repeat what they read."""
BLOOM = {"embedding_scale": 0.2, "gain": 2.5}
"""BLOOM norms its embeddings, so its branches must be as loud."""


def gpt2() -> list[Case]:
    config = {
        "vocab_size": 64,
        "n_positions": 64,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    v4 = published(
        "gpt2",
        "GPT2LMHeadModel",
        config,
        n_ctx=64,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
        resid_pdrop=0.1,
        summary_type="cls_index",
        summary_activation=None,
        summary_first_dropout=0.1,
        summary_proj_to_labels=True,
        summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    )

    def bare(tensors: dict[str, Any]) -> dict[str, Any]:
        names = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        mask = next(iter(tensors.values())).new_ones(64, 64).tril()[None, None]
        return names | {f"h.{layer}.attn.bias": mask.bool() for layer in range(2)}

    shape = {**SHAPE, "transposed": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}
    scaled = config | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 24}
    return [
        Case("gpt2", "gpt2", config, v4, **shape),
        Case(
            "gpt2_bare",
            "gpt2",
            scaled,
            v4 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 24},
            {"scale_attn_by_inverse_layer_idx": False},
            rename=bare,
            **shape,
            note="tensors are named as in the first published files, without a prefix, and the causal masks"
            " are stored among them; attention is scaled by the layer's number",
        ),
    ]


def gpt_neox() -> list[Case]:
    config = (
        BODY
        | UNTIED
        | {
            "num_attention_heads": 2,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.25,
            },
        }
    )
    sequential = config | {"use_parallel_residual": False}

    def old(config: dict[str, Any]) -> dict[str, Any]:
        return published(
            "gpt_neox", "GPTNeoXForCausalLM", config, rotary_pct=0.25, rotary_emb_base=1000, layer_norm_eps=1e-5
        )

    def with_buffers(tensors: dict[str, Any]) -> dict[str, Any]:
        like = next(iter(tensors.values()))
        for layer in range(2):
            prefix = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{prefix}.bias"] = like.new_ones(64, 64).tril()[None, None].bool()
            tensors[f"{prefix}.masked_bias"] = like.new_tensor(-1e9)
            tensors[f"{prefix}.rotary_emb.inv_freq"] = like.new_tensor([1.0, 1000**-0.5])
        return tensors

    return [
        Case("gpt_neox", "gpt_neox", config, old(config), {"use_parallel_residual": False}),
        Case(
            "gpt_neox_sequential",
            "gpt_neox",
            sequential,
            old(sequential),
            rename=with_buffers,
            note="masks and rotary frequencies are stored among the tensors, as in older published files",
        ),
    ]


def falcon() -> list[Case]:
    body = {key: value for key, value in BODY.items() if key != "intermediate_size"} | TIED | {"hidden_size": 24}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    flags = {"alibi": False, "bias": False, "new_decoder_architecture": False}
    seven = body | flags | {"multi_query": True, "parallel_attn": True, "rope_parameters": rope}
    forty = seven | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}
    eleven = forty | {"num_ln_in_parallel_attn": 1}
    rw = seven | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}

    def old(config: dict[str, Any], **more: Any) -> dict[str, Any]:
        extra = {"apply_residual_connection_post_layernorm": False, "layer_norm_epsilon": 1e-5}
        return published("falcon", "FalconForCausalLM", config, **extra, **more)

    return [
        Case("falcon", "falcon", seven, old(seven), **SHAPE, note="one key head; attention beside the MLP"),
        Case(
            "falcon_new",
            "falcon",
            forty,
            old(forty, rope_theta=10000.0),
            **SHAPE,
            note="keys and values fused group by group; a norm for each branch",
        ),
        Case(
            "falcon_new_one_norm",
            "falcon",
            eleven,
            old(eleven),
            **SHAPE,
            note="grouped as falcon_new, with one norm for both branches",
        ),
        Case(
            "falcon_alibi",
            "falcon",
            rw,
            old(rw),
            **SHAPE,
            attention="sdpa",
            note="ALiBi, scaled by 1 / sqrt(head_dim) with the scores (transformers' eager attention adds it"
            " twice, so this case uses its default); slopes here are exact in bfloat16, to which transformers"
            " rounds them",
        ),
    ]


def alibi() -> list[Case]:
    bloom = {
        "vocab_size": 64,
        "hidden_size": 24,
        "n_layer": 2,
        "n_head": 6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    post = bloom | {"hidden_size": 24, "n_head": 4, "apply_residual_connection_post_layernorm": True}

    def old_bloom(config: dict[str, Any]) -> dict[str, Any]:
        renamed = {"hidden_size": "n_embed", "n_head": "num_attention_heads"}
        config = {renamed.get(key, key): value for key, value in config.items()}
        return published(
            "bloom",
            "BloomForCausalLM",
            config,
            attention_softmax_in_fp32=True,
            masked_softmax_fusion=True,
            offset_alibi=100,
            pretraining_tp=1,
            seq_length=64,
            skip_bias_add=True,
            skip_bias_add_qkv=False,
            layer_norm_epsilon=1e-5,
            unk_token_id=0,
        )

    def bare(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    mpt = {
        "vocab_size": 64,
        "d_model": 24,
        "n_heads": 6,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"alibi": True, "alibi_bias_max": 8},
    }
    old_attention = {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    }
    old_mpt = published(
        "mpt",
        "MPTForCausalLM",
        mpt | {"attn_config": old_attention},
        emb_pdrop=0,
        expansion_ratio=4,
        init_config={"name": "kaiming_normal_", "fan_mode": "fan_in"},
        init_device="cpu",
        learned_pos_emb=True,
        logit_scale=None,
        no_bias=True,
        norm_type="low_precision_layernorm",
        resid_pdrop=0,
        verbose=0,
    )
    return [
        Case("bloom", "bloom", bloom, old_bloom(bloom), **BLOOM, note="six heads: slopes of two series"),
        Case(
            "bloom_post_norm",
            "bloom",
            post,
            old_bloom(post),
            {"apply_residual_connection_post_layernorm": False},
            rename=bare,
            **BLOOM,
            note="residuals start after the norms; tensors are named without a prefix, as published",
        ),
        Case("mpt", "mpt", mpt, old_mpt, **SHAPE, note="six heads: every second slope first"),
    ]


def rotary() -> list[Case]:
    starcoder2 = (
        BODY
        | TIED
        | {
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        }
    )
    stablelm = (
        BODY
        | UNTIED
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "use_qkv_bias": True,
            "layer_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
            },
        }
    )
    parallel = stablelm | {
        "num_attention_heads": 4,
        "use_qkv_bias": False,
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    return [
        Case(
            "starcoder2",
            "starcoder2",
            starcoder2,
            published(
                "starcoder2",
                "Starcoder2ForCausalLM",
                starcoder2,
                rope_theta=100000.0,
                hidden_act="gelu_pytorch_tanh",
                mlp_type="default",
                norm_type="layer_norm",
            ),
            {"sliding_window": 7},
            **SHAPE,
        ),
        Case(
            "stablelm",
            "stablelm",
            stablelm,
            published(
                "stablelm",
                "StableLmForCausalLM",
                stablelm,
                rope_theta=10000,
                partial_rotary_factor=0.25,
                hidden_act="silu",
            ),
            {"layer_norm_eps": 0.1},
        ),
        Case(
            "stablelm_parallel",
            "stablelm",
            parallel,
            published(
                "stablelm",
                "StableLmForCausalLM",
                parallel,
                rope_theta=10000,
                partial_rotary_factor=0.5,
                rope_scaling=None,
            ),
            note="both branches read one norm; queries and keys are normed with a weight for each head",
        ),
    ]


CASES = [*gpt2(), *gpt_neox(), *falcon(), *alibi(), *rotary()]
