"""What a golden case is, and what the cases share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint.

    `config` holds the arguments of the family's configuration class in transformers 5, `v4` the whole
    `config.json` that says the same in the older form. `matters` names settings (dots lead into nested
    ones) with another value each: the logits must move when the setting does.
    """

    name: str
    family: str
    config: dict[str, Any]
    v4: dict[str, Any] | None = None
    matters: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    length: int = 20
    prompt_lengths: tuple[int, int] = (11, 7)
    seed: int = 0
    gain: float = 1.0
    embedding_scale: float = 1.0
    transposed: tuple[str, ...] = ()
    """Endings of the names of matrices stored [..., in, out]."""
    attention: str = "eager"
    dtype: str = "float32"
    shard: int | None = None
    """Largest shard in bytes; None for one file."""
    generation: dict[str, Any] | None = None
    rename: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """From the tensors that transformers 5 saves to those found in published files."""


BODY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}


def published(model_type: str, architecture: str, config: dict[str, Any], **older: Any) -> dict[str, Any]:
    """The older form of `config`: with `older` in place of what transformers 5 renamed or brought in."""
    new = {"rope_parameters", "layer_types", "dtype"}
    kept = {key: value for key, value in config.items() if key not in new}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **kept,
        **older,
        "torch_dtype": "float32",
        "transformers_version": "4.45.2",
        "use_cache": True,
    }
