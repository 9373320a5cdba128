"""What many families say alike in `config.json`: sizes, ropes, windows, activations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinf.checkpoint.config import Config
from jaxinf.checkpoint.names import Names
from jaxinf.layers import (
    AttentionSpec,
    DynamicNTKRopeSpec,
    LayerSpec,
    LinearRopeSpec,
    Llama3RopeSpec,
    LongRopeSpec,
    RopeSpec,
    YarnRopeSpec,
)
from jaxinf.models import ModelSpec, fold

NONLINEARITIES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """How to read the configs and weights of one or more model types.

    read: from the config to the spec. names: from the spec to the weight names.
    """

    read: Callable[[Config], ModelSpec]
    names: Callable[[ModelSpec], Names]


def heads(cfg: Config, *, head_dim: int | None = None) -> AttentionSpec:
    """Head counts and sizes. `head_dim` is what the family takes where the config says nothing."""
    query = cfg.int("num_attention_heads")
    kv = cfg.int("num_key_value_heads", default=query)
    dim = cfg.int("head_dim", default=head_dim or _divide(cfg, query))
    return AttentionSpec(query, kv, dim)


def _divide(cfg: Config, query: int) -> int:
    width = cfg.int("hidden_size")
    if width % query and "head_dim" not in cfg:
        raise cfg.refuse("hidden_size", f"is no multiple of num_attention_heads={query}")
    return width // query


def rope(
    cfg: Config,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    theta_key: str = "rope_theta",
    partial: float = 1.0,
    partial_key: str = "partial_rotary_factor",
    interleaved: bool = False,
    section: Config | None = None,
) -> RopeSpec:
    """The rope that `rope_parameters` describes, or `rope_scaling` with keys beside it in older files.

    theta, partial: the family's defaults; `*_key`: what older files of the family call them.
    section: where `rope_parameters` lies if not under its own name.
    """
    if section is None:
        section = cfg.section("rope_scaling" if "rope_scaling" in cfg else "rope_parameters")
    theta = section.float("rope_theta", default=cfg.float(theta_key, default=theta))
    partial = section.float("partial_rotary_factor", default=cfg.float(partial_key, default=partial))
    base = RopeSpec(int(head_dim * partial), theta, interleaved)
    kind = section.choose({k: k for k in _ROPES}, "rope_type", "type", default="default")
    section.ignore("type")
    return _ROPES[kind](cfg, section, base)


def _default(cfg: Config, section: Config, base: RopeSpec) -> RopeSpec:
    cfg.ignore("original_max_position_embeddings")
    return base


def _scaled(kind: type[RopeSpec], base: RopeSpec, **more: Any) -> RopeSpec:
    return kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)}, **more)


def _linear(cfg: Config, section: Config, base: RopeSpec) -> RopeSpec:
    return _scaled(LinearRopeSpec, base, factor=section.float("factor"))


def _dynamic(cfg: Config, section: Config, base: RopeSpec) -> RopeSpec:
    length = context(cfg)
    section.only("original_max_position_embeddings", length)
    return _scaled(DynamicNTKRopeSpec, base, factor=section.float("factor"), original_max=length)


def _trained(cfg: Config, section: Config) -> int:
    beside = cfg.int("original_max_position_embeddings", default=None)
    within = section.int("original_max_position_embeddings", default=None)
    return beside or within or context(cfg)


def _llama3(cfg: Config, section: Config, base: RopeSpec) -> RopeSpec:
    return _scaled(
        Llama3RopeSpec,
        base,
        factor=section.float("factor"),
        low_freq_factor=section.float("low_freq_factor"),
        high_freq_factor=section.float("high_freq_factor"),
        original_max=_trained(cfg, section),
    )


def _yarn(cfg: Config, section: Config, base: RopeSpec) -> RopeSpec:
    trained = _trained(cfg, section)
    factor = section.float("factor", default=context(cfg) / trained)
    on_scores = section.float("attention_factor", default=None)
    one, every = section.float("mscale", default=None), section.float("mscale_all_dim", default=None)
    if on_scores is None and one and every:
        grow = math.log(max(factor, 1.0))
        on_scores = (0.1 * one * grow + 1.0) / (0.1 * every * grow + 1.0)
    section.ignore("finetuned")
    return _scaled(
        YarnRopeSpec,
        base,
        factor=factor,
        original_max=trained,
        beta_fast=section.float("beta_fast", default=None) or 32.0,
        beta_slow=section.float("beta_slow", default=None) or 1.0,
        factor_on_scores=on_scores,
        truncate=section.bool("truncate", default=True),
    )


def _long(cfg: Config, section: Config, base: RopeSpec) -> RopeSpec:
    trained = _trained(cfg, section)
    factor = section.float("factor", default=context(cfg) / trained)
    grown = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factors = {}
    for name in ("short", "long"):
        values = section.list(f"{name}_factor", (int, float))
        if len(values) != base.dim // 2:
            raise section.refuse(f"{name}_factor", f"must have {base.dim // 2} entries, one for each frequency")
        factors[name] = tuple(map(float, values))
    return _scaled(
        LongRopeSpec,
        base,
        **factors,
        original_max=trained,
        factor_on_scores=section.float("attention_factor", default=grown),
    )


_ROPES: dict[str, Callable[[Config, Config, RopeSpec], RopeSpec]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _long,
    "su": _long,
}


def context(cfg: Config, default: int = 2048) -> int:
    return cfg.int("max_position_embeddings", "max_sequence_length", default=default)


def kinds(cfg: Config, depth: int, otherwise: Callable[[int], bool]) -> list[bool]:
    """Whether each layer slides: `layer_types`, or the family's rule by layer index in older files."""
    names = cfg.list("layer_types", str, default=None)
    if names is None:
        return [bool(otherwise(i)) for i in range(depth)]
    if unknown := sorted(set(names) - {FULL, SLIDING}):
        raise cfg.refuse("layer_types", f"holds {', '.join(unknown)}; supported are {FULL} and {SLIDING}")
    if len(names) != depth:
        raise cfg.refuse("layer_types", f"must have {depth} entries, one for each layer")
    return [name == SLIDING for name in names]


def windows(cfg: Config, depth: int, otherwise: Callable[[int], bool], *, default: int | None = None):
    """The window of each layer, or None where it sees everything."""
    size = cfg.int("sliding_window", default=None if cfg.null("sliding_window") else default)
    sliding = kinds(cfg, depth, otherwise)
    if any(sliding) and not size:
        raise cfg.refuse("sliding_window", "must be a number of tokens: layers slide")
    return [size if slides else None for slides in sliding]


def decoder(
    cfg: Config, layers: Iterable[LayerSpec], *, tied: bool, context_length: int | None = None, **more: Any
) -> ModelSpec:
    """The model of these layers. `tied`: what the family takes where the config says nothing."""
    return ModelSpec(
        vocab=cfg.int("vocab_size"),
        d_model=cfg.int("n_embed", "n_embd", "d_model", "hidden_size"),
        segments=fold(tuple(layers)),
        context=context_length or context(cfg),
        tied=cfg.bool("tie_word_embeddings", default=tied),
        **more,
    )


def each(layer: LayerSpec, attentions: Sequence[AttentionSpec]) -> list[LayerSpec]:
    """Copies of `layer`, one for each attention."""
    return [dataclasses.replace(layer, attention=a) for a in attentions]
