"""What a checkpoint's generation_config.json asks of every answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pallas_kernels.errors import InputError

NEW_TOKENS = 64
_NAME = "generation_config.json"

# What would change an answer and is not done here, with the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "token_healing": (),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Defaults:
    """What holds where a call says nothing.

    sampling: the file itself; see `sampling_params`.
    eos: ids that end an answer. stops: strings that do. suppressed: ids that are never drawn.
    new_tokens: at most. length: of prompt and answer together, at most; it counts where neither the call nor the
      file says how many tokens are new.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    eos: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    suppressed: tuple[int, ...] = ()
    new_tokens: int | None = None
    length: int | None = None

    @classmethod
    def of(cls, generation: Mapping[str, Any]) -> Defaults:
        """The defaults in the contents of a generation_config.json.

        Raises:
          InputError: a value that is none of its key's, by name.
        """
        stops = generation.get("stop_strings") or ()
        stops = (stops,) if isinstance(stops, str) else stops
        if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) and s for s in stops):
            raise InputError(f"{_NAME}: stop_strings={stops!r} must be a string or a list of them, none empty")
        return cls(
            sampling=dict(generation),
            eos=_ids(generation, "eos_token_id"),
            stops=tuple(stops),
            suppressed=_ids(generation, "suppress_tokens"),
            new_tokens=_count(generation, "max_new_tokens"),
            length=_count(generation, "max_length"),
        )

    def limit(self, prompt_tokens: int) -> int:
        """New tokens of an answer to a prompt of this length."""
        if self.new_tokens is not None:
            return self.new_tokens
        return NEW_TOKENS if self.length is None else max(1, min(NEW_TOKENS, self.length - prompt_tokens))


def not_done(generation: Mapping[str, Any]) -> list[str]:
    """`key=value` of each setting that would change an answer and is not done here."""
    return [
        f"{key}={generation[key]!r}"
        for key, nothing in _NOT_DONE.items()
        if generation.get(key) not in (None, False, *nothing) and generation[key] not in ([], {})
    ]


def _ids(generation: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = generation.get(key)
    ids = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(f"{_NAME}: {key}={value!r} must be a token id or a list of them")
    return tuple(ids)


def _count(generation: Mapping[str, Any], key: str) -> int | None:
    value = generation.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{_NAME}: {key}={value!r} must be a whole number of at least 1")
    return value
