"""Cases of scaled rotary positions: each kind on a Llama body, and Phi-3 with its own fused weights."""

from typing import Any

from case import BODY, TIED, UNTIED, Case, published

SMALL = BODY | UNTIED | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
SHORT_FACTOR = [1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0]
LONG_FACTOR = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0]


def scaled(
    name: str,
    theta: float,
    scaling: dict[str, Any],
    matters: dict[str, Any],
    positions: int = 64,
    note: str = "",
    **shape: Any,
) -> Case:
    """A Llama whose rotary positions are scaled; the older config names the kind by `type`."""
    config = SMALL | {
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_theta": theta, **scaling},
    }
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    v4 = published("llama", "LlamaForCausalLM", config, rope_theta=theta, rope_scaling=old)
    matters = {f"rope_parameters.{key}": value for key, value in matters.items()}
    return Case(name, "llama", config, v4, matters, note, **shape)


def llama() -> list[Case]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    longrope = {"rope_type": "longrope", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR}
    return [
        scaled("rope_linear", 100.0, {"rope_type": "linear", "factor": 3.0}, {"factor": 2.0}),
        scaled(
            "rope_dynamic",
            100.0,
            {"rope_type": "dynamic", "factor": 2.0},
            {"factor": 4.0},
            positions=40,
            length=56,
            note="the logits are beyond the trained context, where the base grows with the length of the"
            " sequence; greedy decoding stays within it, where cached keys need no new rotation",
        ),
        scaled("rope_yarn", 100.0, yarn, {"factor": 2.0, "original_max_position_embeddings": 16}),
        scaled(
            "rope_yarn_mscale",
            100.0,
            yarn | {"beta_fast": 8.0, "beta_slow": 0.5, "mscale": 2.0, "mscale_all_dim": 0.5},
            {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 2.0, "beta_slow": 1.0},
        ),
        scaled(
            "rope_yarn_exact",
            100.0,
            yarn | {"attention_factor": 1.5, "truncate": False},
            {"attention_factor": 1.0, "truncate": True},
        ),
        scaled(
            "rope_longrope_short",
            100.0,
            longrope | {"factor": 4.0, "original_max_position_embeddings": 64},
            {"short_factor": LONG_FACTOR, "factor": 2.0},
            positions=256,
            note="all lengths are within the original context: short_factor",
        ),
        scaled(
            "rope_longrope_long",
            100.0,
            longrope | {"factor": 4.0, "original_max_position_embeddings": 16},
            {"long_factor": SHORT_FACTOR, "factor": 2.0},
            length=24,
            prompt_lengths=(20, 18),
            note="all lengths are beyond the original context, prompts too: long_factor",
        ),
    ]


def phi3() -> list[Case]:
    body = BODY | UNTIED | {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "pad_token_id": None}
    factors = {"short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR}
    plain = body | {
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    }
    long = body | {
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **factors},
    }
    partial_factors = {name: values[:6] for name, values in factors.items()}
    partial = (
        body
        | TIED
        | {
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                **partial_factors,
            },
        }
    )
    return [
        Case(
            "phi3",
            "phi3",
            plain,
            published("phi3", "Phi3ForCausalLM", plain, rope_theta=10000.0, rope_scaling=None),
            {"sliding_window": 7},
        ),
        Case(
            "phi3_long",
            "phi3",
            long,
            published(
                "phi3", "Phi3ForCausalLM", long, rope_theta=100.0, rope_scaling={"type": "longrope", **factors}
            ),
            {"rope_parameters.long_factor": SHORT_FACTOR, "max_position_embeddings": 32},
            note="all lengths are beyond the original context; the factor on cosine and sine follows from"
            " max_position_embeddings / original_max_position_embeddings",
            length=24,
            prompt_lengths=(20, 18),
        ),
        Case(
            "phi3_partial",
            "phi3",
            partial,
            published(
                "phi3",
                "Phi3ForCausalLM",
                partial,
                rope_theta=100.0,
                partial_rotary_factor=0.75,
                rope_scaling={"type": "longrope", **partial_factors},
            ),
            {"rope_parameters.short_factor": LONG_FACTOR[:6]},
            embedding_scale=0.25,
            gain=1.5,
            note="three quarters of each head rotate; all lengths are within the original context",
        ),
    ]


CASES = [*llama(), *phi3()]
