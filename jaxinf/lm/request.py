"""The arguments of `LM.generate`, checked before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from jaxinf.cache import Kind, check_kind
from jaxinf.generation import Processor, SamplingParams
from jaxinf.lm.defaults import Defaults
from jaxinf.lm.tokenizer import Tokenizer
from jaxinf.models import ModelSpec
from pallas_kernels.errors import InputError

DEFAULT_SINKS = 4
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_MOST_TOKENS = 2**31 - 1  # positions are int32


class Options(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream`, `chat` and `warmup`; see `LM.generate`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int]
    stop: str | Sequence[str] | None
    logprobs: bool | int
    logit_bias: Mapping[int, float] | None
    processors: Sequence[Processor]
    eos: int | Sequence[int] | None
    window: int | None
    sinks: int | None
    cache: Kind | None


@dataclass(frozen=True)
class Facts:
    """What a request is checked against.

    context: tokens that a prompt and its answer may have together. defaults, window, sinks, cache: of every
      generation, unless the call says otherwise.
    """

    spec: ModelSpec
    context: int
    tokenizer: Tokenizer | None = None
    defaults: Defaults = Defaults()
    window: int | None = None
    sinks: int = 0
    cache: Kind | None = None


@dataclass(frozen=True)
class Request:
    """Prompts and, for each of their rows (`samples` a prompt, side by side), how it is continued.

    single: one prompt was given, not a list. logprobs: None, or the number of alternatives to keep.
    """

    prompts: list[list[int]]
    single: bool
    samples: int
    limits: list[int]
    params: list[SamplingParams]
    seeds: list[int]
    eos: tuple[int, ...]
    stops: tuple[str, ...]
    logprobs: int | None
    processors: tuple[Processor, ...]
    window: int | None
    sinks: int
    cache: Kind | None

    @property
    def tokens(self) -> int:
        """Slots that the longest row needs: all but its last token are stored."""
        rows = (p for p in self.prompts for _ in range(self.samples))
        return max(len(p) + limit - 1 for p, limit in zip(rows, self.limits, strict=True))


def make_request(
    facts: Facts,
    prompts: Any,
    max_new_tokens: int | Sequence[int] | None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] | None = None,
    n: int = 1,
    logprobs: bool | int = False,
    logit_bias: Mapping[int, float] | None = None,
    processors: Sequence[Processor] = (),
    eos: int | Sequence[int] | None = None,
    window: int | None = None,
    sinks: int | None = None,
    cache: Kind | None = None,
) -> Request:
    """See `LM.generate`.

    Raises:
      InputError: anything out of range, by name.
    """
    ids, single = token_lists(facts, prompts)
    window, sinks = window_of(facts, window, sinks)
    check_kind("cache", cache)
    n = whole_number("n", n, least=1)
    if max_new_tokens is None:
        limits = [facts.defaults.limit(len(prompt)) for prompt in ids]
    else:
        limits = _each("max_new_tokens", max_new_tokens, len(ids), least=1)
    room = _room(facts, window)
    for i, prompt in enumerate(ids):
        if room is not None:
            if len(prompt) > room:
                which = "the prompt" if single else f"prompt {i}"
                raise InputError(
                    f"{which} has {len(prompt)} tokens, but the context is {room}; shorten it"
                    + (
                        ""
                        if facts.spec.learned_positions
                        else ", or give window= for a bounded memory of the latest"
                    )
                )
            # The last token is not read again, so it needs no place in the context.
            limits[i] = min(limits[i], room - len(prompt) + 1)
        limits[i] = min(limits[i], _MOST_TOKENS - len(prompt))
    if facts.defaults.suppressed and isinstance(logit_bias, Mapping | None):
        never = (t for t in facts.defaults.suppressed if t < facts.spec.vocab)
        logit_bias = dict.fromkeys(never, -math.inf) | dict(logit_bias or {})
    params = sampling_params(
        facts.defaults.sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
    )
    for token in params.logit_bias:
        if token >= facts.spec.vocab:
            raise InputError(f"logit_bias has the token {token}, but the vocabulary has {facts.spec.vocab}")
    seeds = [(s + i) % 2**32 for s in _seeds(seed, len(ids)) for i in range(n)]
    return Request(
        prompts=ids,
        single=single,
        samples=n,
        limits=[limit for limit in limits for _ in range(n)],
        params=[params] * (len(ids) * n),
        seeds=seeds,
        eos=facts.defaults.eos if eos is None else tuple(_eos(facts, eos)),
        stops=_stops(facts, stop),
        logprobs=_logprobs(facts, logprobs),
        processors=_processors(processors),
        window=window,
        sinks=sinks,
        cache=facts.cache if cache is None else cache,
    )


def token_lists(facts: Facts, prompts: Any) -> tuple[list[list[int]], bool]:
    """Checked token ids of each prompt, and whether one prompt was given rather than a list of them."""
    if isinstance(prompts, str):
        return [_encode(facts, prompts, "the prompt")], True
    if hasattr(prompts, "ndim"):  # an array
        if prompts.ndim not in (1, 2):
            raise InputError(f"prompts.shape={tuple(prompts.shape)} must be [tokens] or [prompts, tokens]")
        if prompts.ndim == 1:
            return [_ids(facts, prompts, "the prompt")], True
        prompts = list(prompts)
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InputError(f"prompts is a {type(prompts).__name__}; give text, token ids, or a list of either")
    if not prompts:
        raise InputError("the prompt is empty; give some text or at least one token")
    if all(isinstance(p, str) for p in prompts):
        return [_encode(facts, p, f"prompt {i}") for i, p in enumerate(prompts)], False
    if not any(isinstance(p, str) for p in prompts) and all(np.ndim(p) for p in prompts):
        return [_ids(facts, p, f"prompt {i}") for i, p in enumerate(prompts)], False
    return [_ids(facts, prompts, "the prompt")], True


def window_of(facts: Facts, window: int | None, sinks: int | None) -> tuple[int | None, int]:
    """The bounded memory to generate with: the call's, else the model's."""
    if window is None and sinks is None:
        return facts.window, facts.sinks
    window = facts.window if window is None else whole_number("window", window, least=1)
    if window is None:
        raise InputError(f"sinks={sinks} needs a window: give window= too")
    return window, DEFAULT_SINKS if sinks is None else whole_number("sinks", sinks, least=0)


def context_of(spec: ModelSpec, context: int | None) -> int:
    """`context` checked, or what the model was made for."""
    if context is None:
        return spec.context
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise InputError(f"context={context!r} must be a whole number of at least 1")
    if spec.learned_positions is not None and context > spec.learned_positions:
        raise InputError(f"context={context}, but this model has learned {spec.learned_positions} positions")
    return context


def only_one(request: Request) -> None:
    """Refuses several prompts or answers."""
    if not request.single or request.samples != 1:
        raise InputError("stream and chat give one answer to one prompt; use generate for several")


def sampling_params(
    generation: Mapping[str, Any], *, logit_bias: Mapping[int, float] | None = None, **explicit: Any
) -> SamplingParams:
    """Explicit arguments; else generation_config.json, whose sampling counts where it says do_sample; else greedy.

    A top_k, top_p or min_p without a temperature samples at temperature 1.
    """
    values: dict[str, Any] = {name: value for name, value in explicit.items() if value is not None}
    if "repetition_penalty" not in values and generation.get("repetition_penalty") is not None:
        values["repetition_penalty"] = generation["repetition_penalty"]
    if generation.get("do_sample"):
        published = {"temperature": 1.0} | {k: generation[k] for k in _SAMPLED if generation.get(k) is not None}
        if published.get("top_k") == 0:  # says none
            del published["top_k"]
        values = published | values
    elif "temperature" not in values and any(name in values for name in _SAMPLED):
        values["temperature"] = 1.0
    return SamplingParams(
        **values, logit_bias=dict(logit_bias) if isinstance(logit_bias, Mapping) else logit_bias or {}
    )


def _room(facts: Facts, window: int | None) -> int | None:
    """Tokens that prompt and answer may have; None: no limit."""
    return facts.context if window is None else facts.spec.learned_positions


def _encode(facts: Facts, text: str, which: str) -> list[int]:
    if facts.tokenizer is None:
        raise InputError(f"{which} is text, but this model came without a tokenizer; give token ids")
    if not text:
        raise InputError(f"{which} is empty; give some text or at least one token")
    return _ids(facts, facts.tokenizer.encode(text), which)


def _ids(facts: Facts, tokens: Any, which: str) -> list[int]:
    try:
        array = np.asarray(tokens)
    except ValueError:
        array = np.asarray(tokens, dtype=object)
    if array.size == 0:
        raise InputError(f"{which} is empty; give some text or at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        kind = f"of dtype {array.dtype}" if array.dtype != object and array.ndim == 1 else "of mixed kinds"
        raise InputError(f"{which} has token ids {kind}; give a flat list of integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= facts.spec.vocab:
        bad = low if low < 0 else high
        raise InputError(f"{which} has the token id {bad}, but ids go from 0 to {facts.spec.vocab - 1}")
    return array.tolist()


def whole_number(name: str, value: Any, *, least: int) -> int:
    """`value` as an int, or an `InputError`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)


def _each(name: str, value: Any, prompts: int, *, least: int) -> list[int]:
    """One value a prompt."""
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
        if len(value) != prompts:
            raise InputError(
                f"{name} has {len(value)} entries for {prompts} prompts; give one each, or one for all"
            )
        return [whole_number(f"{name}[{i}]", v, least=least) for i, v in enumerate(value)]
    return [whole_number(name, value, least=least)] * prompts


def _seeds(seed: Any, prompts: int) -> list[int]:
    seeds = _each("seed", seed, prompts, least=0)
    for value in seeds:
        if value >= 2**32:
            raise InputError(f"seed={value} must be below 2**32")
    return seeds


def _stops(facts: Facts, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return () if facts.tokenizer is None else facts.defaults.stops
    stops: Any = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"stop={stop!r} must be a string or several, none of them empty")
    if stops and facts.tokenizer is None:
        raise InputError(f"stop={stop!r} needs a tokenizer, and this model came without one; use eos=")
    return tuple(stops)


def _eos(facts: Facts, eos: int | Sequence[int]) -> list[int]:
    return [] if isinstance(eos, Sequence) and not eos else _ids(facts, np.atleast_1d(np.asarray(eos)), "eos")


def _logprobs(facts: Facts, logprobs: bool | int) -> int | None:
    if logprobs is False or logprobs is None:
        return None
    count = 0 if logprobs is True else whole_number("logprobs", logprobs, least=0)
    if count > facts.spec.vocab:
        raise InputError(f"logprobs={count} must be at most the vocabulary, {facts.spec.vocab}")
    return count


def _processors(processors: Sequence[Processor]) -> tuple[Processor, ...]:
    if callable(processors):
        return (processors,)
    if not isinstance(processors, Sequence) or not all(callable(p) for p in processors):
        raise InputError("processors must be functions of (logits, context)")
    return tuple(processors)
