"""Cases that alternate windows and full attention: Gemma, GPT-OSS and Cohere 2, with their elders."""

from case import BODY, TIED, UNTIED, Case, published

GEMMA = BODY | TIED | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 16}


def gemma() -> list[Case]:
    default = {"rope_type": "default", "rope_theta": 1e4}
    gemma1 = GEMMA | {"num_key_value_heads": 1, "rope_parameters": default}
    gemma2 = GEMMA | {
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "rope_parameters": default,
    }
    gemma3 = GEMMA | {
        "hidden_size": 24,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    }
    return [
        Case(
            "gemma",
            "gemma",
            gemma1,
            published(
                "gemma",
                "GemmaForCausalLM",
                gemma1,
                rope_theta=10000.0,
                rope_scaling=None,
                hidden_act="gelu",
                hidden_activation=None,
                rms_norm_eps=1e-6,
            ),
            embedding_scale=0.2,
            gain=2.0,
            note="gelu in the older config means its tanh form",
        ),
        Case(
            "gemma2",
            "gemma2",
            gemma2,
            published(
                "gemma2",
                "Gemma2ForCausalLM",
                gemma2,
                rope_theta=10000.0,
                hidden_act="gelu_pytorch_tanh",
                hidden_activation="gelu_pytorch_tanh",
                cache_implementation="hybrid",
                attention_bias=False,
            ),
            {
                "sliding_window": 6,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 16,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            embedding_scale=0.15,
            gain=2.0,
        ),
        Case(
            "gemma3",
            "gemma3_text",
            gemma3,
            published(
                "gemma3_text",
                "Gemma3ForCausalLM",
                gemma3,
                rope_theta=10000.0,
                rope_local_base_freq=100.0,
                rope_scaling={"factor": 4.0, "rope_type": "linear"},
                sliding_window_pattern=6,
                hidden_activation="gelu_pytorch_tanh",
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                cache_implementation="hybrid",
            ),
            {
                "sliding_window": 6,
                "query_pre_attn_scalar": 8,
                "rope_parameters.sliding_attention.rope_theta": 1e4,
                "rope_parameters.full_attention.rope_theta": 100.0,
                "rope_parameters.full_attention.factor": 1.0,
            },
            embedding_scale=0.25,
            gain=1.5,
            note="five windows to one full layer, and a remainder of two",
        ),
    ]


def gpt_oss() -> list[Case]:
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    }
    config = (
        BODY
        | UNTIED
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_limit": 1.5,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 100.0, **yarn},
        }
    )
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    v4 = published(
        "gpt_oss",
        "GptOssForCausalLM",
        config,
        rope_theta=100,
        rope_scaling=yarn,
        layer_types=kinds,
        attention_bias=True,
        experts_per_token=2,
        initial_context_length=32,
        hidden_act="silu",
    )
    return [
        Case(
            "gpt_oss",
            "gpt_oss",
            config,
            v4,
            {
                "sliding_window": 6,
                "swiglu_limit": 7.0,
                "num_experts_per_tok": 1,
                "rope_parameters.truncate": True,
                "rope_parameters.factor": 2.0,
            },
            transposed=("gate_up_proj", "down_proj"),
            gain=1.5,
            note="learned sinks, clamped gated experts with biases, alternating windows",
        )
    ]


def cohere() -> list[Case]:
    body = (
        BODY
        | TIED
        | {
            "bos_token_id": 5,
            "pad_token_id": 0,
            "num_key_value_heads": 2,
            "logit_scale": 0.75,
            "layer_norm_eps": 1e-5,
        }
    )
    rope = {"rope_type": "default", "rope_theta": 1e4}
    cohere1 = body | {"use_qk_norm": False, "rope_parameters": rope}
    qk_norm = cohere1 | {"use_qk_norm": True}
    cohere2 = body | {
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    }
    shape = {"embedding_scale": 0.35, "gain": 1.5}
    return [
        Case(
            "cohere",
            "cohere",
            cohere1,
            published("cohere", "CohereForCausalLM", cohere1, rope_theta=10000.0),
            {"logit_scale": 1.0},
            **shape,
        ),
        Case(
            "cohere_qk_norm",
            "cohere",
            qk_norm,
            published("cohere", "CohereForCausalLM", qk_norm, rope_theta=10000.0),
            **shape,
            note="the norms of queries and keys have a weight for each head",
        ),
        Case(
            "cohere2",
            "cohere2",
            cohere2,
            published(
                "cohere2",
                "Cohere2ForCausalLM",
                cohere2,
                rope_theta=50000,
                sliding_window_pattern=3,
                order_of_interleaved_layers="local_attn_first",
                position_embedding_type="rope_gptj",
                rotary_pct=1.0,
                use_embedding_sharing=True,
                use_gated_activation=True,
                use_parallel_block=True,
                use_parallel_embedding=False,
                cache_implementation="hybrid",
            ),
            {"sliding_window": 6},
            **shape,
            note="two windows with rotary positions to one full layer without, and a remainder of one",
        ),
    ]


CASES = [*gemma(), *gpt_oss(), *cohere()]
