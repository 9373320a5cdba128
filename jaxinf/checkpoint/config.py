"""`config.json` of a published checkpoint, read so that no key goes unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.errors import CheckpointError, UnsupportedError

_REQUIRED: Any = object()

_SAYS_WHO = """
    architectures auto_map custom_pipelines dtype model_type name_or_path _name_or_path tokenizer_class
    torch_dtype transformers_version transformers.js_config unsloth_fixed unsloth_version use_bfloat16
"""
_FOR_THE_GENERATOR = """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    model_max_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    pad_token_id prefix remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature top_k top_p typical_p unk_token_id
"""
_FOR_TRAINING = """
    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop
    embedding_dropout gradient_checkpointing hidden_dropout hidden_dropout_prob initializer_range
    output_router_logits resid_pdrop residual_dropout router_aux_loss_coef router_jitter_noise
"""
_FOR_ANOTHER_LIBRARY = """
    _attn_implementation _attn_implementation_autoset attn_implementation cache_implementation
    chunk_size_feed_forward finetuning_task id2label is_decoder label2id output_attentions
    output_hidden_states pretraining_tp problem_type pruned_heads return_dict tf_legacy_loss torchscript
    use_cache use_return_dict
"""
HARMLESS = frozenset(f"{_SAYS_WHO} {_FOR_THE_GENERATOR} {_FOR_TRAINING} {_FOR_ANOTHER_LIBRARY}".split())
"""Keys that change nothing about the logits, whatever they hold."""
_TRUE_UNLESS_SAID = frozenset(["causal", "is_causal", "use_rope", "use_rotary", "use_rotary_embeddings"])
"""Keys that change the logits where they are false; others that nobody asked for switch nothing on then."""


class Config:
    """A JSON object whose keys are asked for one by one; `finish` refuses those that nobody asked for.

    A key that holds null counts as absent. A key with a wrong type is a `CheckpointError`; one that is not
    understood, or whose value is not, an `UnsupportedError`: both name it.
    """

    def __init__(self, values: Mapping[str, Any], at: str):
        self._values = {k: v for k, v in values.items() if v is not None}
        self._null = set(values) - set(self._values)
        self._at = at
        self._seen: set[str] = set()
        self._sections: list[Config] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def null(self, key: str) -> bool:
        """Whether `key` is there and holds null, where that is not the same as absent."""
        return key in self._null

    def default(self, **values: Any) -> None:
        """Fills in keys that are absent."""
        self._values = {**values, **self._values}

    def int(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """The first of `keys` that is there (they are names of one thing)."""
        return self._get(keys, default, int, "an integer")

    def float(self, *keys: str, default: Any = _REQUIRED) -> Any:
        value = self._get(keys, default, (int, float), "a number")
        return float(value) if isinstance(value, int) else value

    def bool(self, *keys: str, default: Any = _REQUIRED) -> Any:
        return self._get(keys, default, bool, "true or false")

    def str(self, *keys: str, default: Any = _REQUIRED) -> Any:
        return self._get(keys, default, str, "a string")

    def list(self, key: str, kind: Any, *, default: Any = _REQUIRED) -> Any:
        """A list whose items are of type `kind`."""
        value = self._get((key,), default, list, "a list")
        if isinstance(value, list) and not all(_is(v, kind) for v in value):
            raise CheckpointError(f"{self._at}: {key}={value!r} must be a list of {kind}")
        return value

    def object(self, key: str) -> dict[str, Any]:
        """A nested object as it stands, empty if absent."""
        return self._get((key,), {}, dict, "an object")

    def section(self, key: str) -> Config:
        """A nested object, empty if absent; `finish` looks into it too."""
        found = Config(self._get((key,), {}, dict, "an object"), f"{self._at}: {key}")
        self._sections.append(found)
        return found

    def only(self, key: str, *allowed: Any) -> None:
        """A key that, where it is there, must hold one of `allowed`: other values are other maths."""
        value = self._get((key,), allowed[0], object, "")
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            choices = " or ".join("absent" if a is None else repr(a) for a in allowed)
            raise UnsupportedError(f"{self._at}: {key}={value!r} is not supported; it must be {choices}")

    def choose(self, table: Mapping[str, Any], *keys: str, default: Any = _REQUIRED) -> Any:
        """The entry of `table` that a string names."""
        name = self.str(*keys, default=default)
        if name not in table:
            raise UnsupportedError(
                f"{self._at}: {keys[0]}={name!r} is not supported; supported are {', '.join(table)}"
            )
        return table[name]

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing in this family."""
        self._seen.update(keys)

    def refuse(self, key: str, why: str) -> UnsupportedError:
        """The error for a value that is understood but cannot be served."""
        return UnsupportedError(f"{self._at}: {key}={self._values.get(key)!r} {why}")

    def finish(self) -> None:
        """Refuses the keys that nobody asked for, unless they are harmless, or null or false and mean "without"."""
        unknown = self._unknown()
        if unknown:
            raise UnsupportedError(
                f"{self._at} has keys that may change the maths and are not understood: {', '.join(unknown)}"
            )

    def _unknown(self) -> Sequence[str]:
        own = [
            f"{key}={_short(value)}"
            for key, value in self._values.items()
            if key not in self._seen and key not in HARMLESS and (value is not False or key in _TRUE_UNLESS_SAID)
        ]
        inner = [f"{s._at.rsplit(': ', 1)[-1]}.{u}" for s in self._sections for u in s._unknown()]
        return own + inner

    def _get(self, keys: tuple[str, ...], default: Any, kind: Any, what: str) -> Any:
        self._seen.update(keys)
        for key in keys:
            if key in self._values:
                value = self._values[key]
                if not _is(value, kind):
                    raise CheckpointError(f"{self._at}: {key}={value!r} must be {what}")
                return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self._at} has no {' or '.join(keys)}")
        return default


def _is(value: Any, kind: Any) -> bool:
    if kind is object or kind is bool:
        return isinstance(value, kind)
    return isinstance(value, kind) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
