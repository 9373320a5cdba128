"""Cases of Llama and its near kin: pre-normed, gated, rotary."""

from case import BODY, TIED, UNTIED, Case, published


def llama() -> list[Case]:
    mha = BODY | UNTIED | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    llama3 = (
        BODY
        | TIED
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "eos_token_id": [2, 60],
            "rope_parameters": {"rope_theta": 500.0, **scaling},
        }
    )
    biased = mha | {"attention_bias": True, "mlp_bias": True}
    return [
        Case(
            "llama",
            "llama",
            mha,
            published("llama", "LlamaForCausalLM", mha, rope_scaling=None, pretraining_tp=1),
            {"rms_norm_eps": 0.1, "rope_parameters.rope_theta": 100.0},
        ),
        Case(
            "llama3",
            "llama",
            llama3,
            published("llama", "LlamaForCausalLM", llama3, rope_theta=500.0, rope_scaling=scaling),
            {"rope_parameters.factor": 2.0, "rope_parameters.low_freq_factor": 2.0},
            embedding_scale=0.25,
            gain=1.5,
            shard=30_000,
            generation={"eos_token_id": [2, 60], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        ),
        Case(
            "llama_bf16",
            "llama",
            biased,
            published("llama", "LlamaForCausalLM", biased) | {"torch_dtype": "bfloat16"},
            dtype="bfloat16",
            note="weights are stored in bfloat16; the logits are those of float32 arithmetic on them",
        ),
        Case(
            "llama_f16",
            "llama",
            mha,
            published("llama", "LlamaForCausalLM", mha) | {"torch_dtype": "float16"},
            dtype="float16",
            shard=20_000,
            note="weights are stored in float16; the logits are those of float32 arithmetic on them",
        ),
    ]


def mistral() -> list[Case]:
    mistral = (
        BODY
        | UNTIED
        | {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    mixtral = mistral | {
        "sliding_window": None,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return [
        Case(
            "mistral",
            "mistral",
            mistral,
            published("mistral", "MistralForCausalLM", mistral, rope_theta=10000.0),
            {"sliding_window": 7},
        ),
        Case(
            "mixtral",
            "mixtral",
            mixtral,
            published("mixtral", "MixtralForCausalLM", mixtral, rope_theta=1e6, router_aux_loss_coef=0.02),
            {"num_experts_per_tok": 1},
        ),
    ]


def qwen() -> list[Case]:
    qwen2 = (
        BODY
        | TIED
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }
    )
    qwen25 = qwen2 | UNTIED | {"num_hidden_layers": 2, "use_sliding_window": False, "rms_norm_eps": 1e-6}
    qwen3 = (
        BODY
        | TIED
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }
    )
    moe = (
        qwen3
        | UNTIED
        | {
            "moe_intermediate_size": 8,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    )
    mixed = moe | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    shared = {key: value for key, value in moe.items() if key != "head_dim"} | {
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    }
    return [
        Case(
            "qwen2",
            "qwen2",
            qwen2,
            published("qwen2", "Qwen2ForCausalLM", qwen2, rope_theta=1e6),
            {"sliding_window": 6, "layer_types": ["full_attention"] * 3},
            embedding_scale=0.25,
            gain=1.5,
            note="the first layer attends to all, the others to a window (max_window_layers)",
        ),
        Case(
            "qwen2_5",
            "qwen2",
            qwen25,
            published("qwen2", "Qwen2ForCausalLM", qwen25, rope_theta=1e6),
            note="a window is configured but not used (use_sliding_window)",
        ),
        Case(
            "qwen3",
            "qwen3",
            qwen3,
            published(
                "qwen3",
                "Qwen3ForCausalLM",
                qwen3,
                rope_theta=1000000,
                rope_scaling=None,
                sliding_window=None,
                use_sliding_window=False,
                max_window_layers=2,
                attention_bias=False,
            ),
            embedding_scale=0.25,
            gain=1.5,
        ),
        Case(
            "qwen3_moe",
            "qwen3_moe",
            moe,
            published(
                "qwen3_moe",
                "Qwen3MoeForCausalLM",
                moe,
                rope_theta=1e6,
                max_window_layers=2,
                sliding_window=None,
            ),
            {"norm_topk_prob": False, "num_experts_per_tok": 2},
        ),
        Case(
            "qwen3_moe_mixed",
            "qwen3_moe",
            mixed,
            published("qwen3_moe", "Qwen3MoeForCausalLM", mixed, rope_theta=1e6),
            {"norm_topk_prob": True},
            note="only the second of four layers is sparse (decoder_sparse_step, mlp_only_layers)",
        ),
        Case(
            "qwen2_moe",
            "qwen2_moe",
            shared,
            published(
                "qwen2_moe",
                "Qwen2MoeForCausalLM",
                shared,
                rope_theta=1e6,
                max_window_layers=2,
                sliding_window=32768,
                use_sliding_window=False,
            ),
            {"norm_topk_prob": True, "num_experts_per_tok": 1},
            note="a shared expert behind a gate",
        ),
    ]


def olmo() -> list[Case]:
    olmo2 = (
        BODY
        | UNTIED
        | {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "pad_token_id": 0,
            "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        }
    )
    olmoe = olmo2 | {
        "num_key_value_heads": 4,
        "intermediate_size": 8,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return [
        Case(
            "olmo2",
            "olmo2",
            olmo2,
            published("olmo2", "Olmo2ForCausalLM", olmo2, rope_theta=500000, rope_scaling=None),
            {"rms_norm_eps": 0.1},
            note="norms after each branch, and over the full width of queries and keys",
        ),
        Case(
            "olmoe",
            "olmoe",
            olmoe,
            published("olmoe", "OlmoeForCausalLM", olmoe, rope_theta=10000.0, clip_qkv=None),
            {"norm_topk_prob": True},
        ),
    ]


def others() -> list[Case]:
    granite = (
        BODY
        | TIED
        | {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    smollm3 = (
        BODY
        | TIED
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pad_token_id": None,
            "no_rope_layers": [1, 0, 1],
            "no_rope_layer_interval": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
        }
    )
    return [
        Case(
            "granite",
            "granite",
            granite,
            published("granite", "GraniteForCausalLM", granite, rope_theta=10000.0, rope_scaling=None),
            {
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
            embedding_scale=0.15,
            gain=2.0,
        ),
        Case(
            "smollm3",
            "smollm3",
            smollm3,
            published("smollm3", "SmolLM3ForCausalLM", smollm3, rope_theta=5e6, use_sliding_window=False),
            {"no_rope_layers": [1, 1, 1]},
            embedding_scale=0.25,
            gain=1.5,
            note="every second layer has no rotary positions",
        ),
    ]


CASES = [*llama(), *mistral(), *qwen(), *olmo(), *others()]
