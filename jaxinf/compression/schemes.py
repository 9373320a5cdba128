"""The schemes that a model can be quantised by, and which of them falls on which matrix."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flax import nnx

from jaxinf.models import CausalLM
from jaxinf.quant import FORMATS, Format, QTensor, format_of
from jaxinf.quant.qtensor import Activations
from pallas_kernels.errors import InputError

Method = Literal["nearest", "smoothquant", "llm-int8", "awq", "gptq"]
KEEP = "keep"
"""As a rule: the matrix stays as it is."""
WHOLE_NUMBERS = {"int8": 8, "int4": 4}
"""Bits of the formats that AWQ and GPTQ round to."""


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a model.

    format: of the matrices, a name in `jaxinf.quant.FORMATS`.
    method: how codes are chosen.
    activations: "int8": inputs are rounded to bytes with a scale a token; None: they are not.
    """

    name: str
    format: str
    method: Method = "nearest"
    activations: Activations | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see text pass through the model."""
        return self.method != "nearest"


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *(Scheme(name, name) for name in FORMATS),
        Scheme("w8a8", "int8", activations="int8"),
        Scheme("smoothquant", "int8", "smoothquant", "int8"),
        Scheme("llm-int8", "int8", "llm-int8", "int8"),
        Scheme("awq", "int4", "awq"),
        Scheme("gptq", "int4", "gptq"),
    )
}
"""By name."""


def scheme_of(name: str) -> Scheme:
    """
    Raises:
      InputError: an unknown name; lists those that there are.
    """
    if name not in SCHEMES:
        raise InputError(f"quantize={name!r} must be one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class Target:
    """What becomes of one matrix `[..., K, N]`.

    group: rows that share a scale.
    method: "nearest" where the scheme's own does not know the format.
    """

    format: Format
    group: int
    method: Method
    activations: Activations | None

    @property
    def bits(self) -> int | None:
        """Of whole numbers; None: the format has others."""
        return WHOLE_NUMBERS.get(self.format.name)


@dataclass(frozen=True)
class Leaf:
    """A matrix of the model, or a stack of them, that may be quantised.

    path: in the model's state. names: of the parameters in it, without ".kernel": "layers.3.attention.query".
    stacked: its first axis counts layers, one name each.
    """

    path: tuple[Any, ...]
    names: tuple[str, ...]
    stacked: bool
    value: Any


def name_of(path: Sequence[Any]) -> str:
    """("attention", "query", "kernel") -> "attention.query"."""
    return ".".join(map(str, path)).removesuffix(".kernel")


def leaves(model: CausalLM) -> Iterator[Leaf]:
    """The matrices that may be quantised, of a model that is abstract or not.

    Raises:
      InputError: the model is quantised already.
    """
    specs = model.spec.segments
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        if isinstance(value, QTensor) or not hasattr(value, "dtype"):
            raise InputError("the model is quantised already; take the original")
        if not variable.get_metadata().get("quantizable", False):
            continue
        _, segment, _, block, *rest = path
        assert isinstance(segment, int)
        assert isinstance(block, int)
        first = sum(s.layers for s in specs[:segment]) + block
        stacked = model.layout == "stacked"
        every = range(specs[segment].repeats if stacked else 1)
        numbers = [first + r * len(specs[segment].period) for r in every]
        yield Leaf(path, tuple(f"layers.{i}.{name_of(rest)}" for i in numbers), stacked, value)


def plan(
    model: CausalLM, scheme: str, *, group: int | None = None, rules: Mapping[str, str] | None = None
) -> dict[str, Target | None]:
    """What becomes of each matrix of a model, abstract or not, by name; None: it is kept.

    Args:
      scheme: a name in `SCHEMES`.
      group: rows that share a scale, where a matrix gets the scheme's own format; None: as the format has it.
      rules: from patterns of names, such as "layers.*.attention.*" (`*` stands for anything), to what matrices get
        instead of the scheme's format: a name in `jaxinf.quant.FORMATS` (their inputs are then not rounded), or
        "keep". Of several patterns that match, the last one counts.

    Raises:
      InputError: an unknown scheme or format, a rule that matches nothing, a group that does not divide, rules
        that treat layers differently which are stacked, or a model that is quantised already.
    """
    own = scheme_of(scheme)
    rules = dict(rules or {})
    for pattern, name in rules.items():
        if name != KEEP and name not in FORMATS:
            raise InputError(f"rule {pattern!r}: {name!r} must be {KEEP!r} or one of {', '.join(FORMATS)}")
    found = list(leaves(model))
    names = [name for leaf in found for name in leaf.names]
    for pattern in rules:
        if not any(matches(pattern, name) for name in names):
            some = ", ".join(names[:4])
            raise InputError(f"rule {pattern!r} matches nothing; there are {some}, ... ({len(names)} in all)")
    planned: dict[str, Target | None] = {}
    for leaf in found:
        chosen = {_rule(rules, name) for name in leaf.names}
        if len(chosen) > 1:
            raise InputError(
                f"the rules give {leaf.names[0]} and the layers stacked with it different formats "
                f'({", ".join(sorted(map(str, chosen)))}); load the model with layout="list", or make them the same'
            )
        target = _target(own, chosen.pop(), group, leaf)
        planned.update(dict.fromkeys(leaf.names, target))
    return planned


def matches(pattern: str, name: str) -> bool:
    """Whether a rule means a matrix, which it may call with ".kernel" too."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"{name}.kernel", pattern)


def _rule(rules: Mapping[str, str], name: str) -> str | None:
    return next((rule for pattern, rule in reversed(list(rules.items())) if matches(pattern, name)), None)


def _target(scheme: Scheme, rule: str | None, group: int | None, leaf: Leaf) -> Target | None:
    if rule == KEEP:
        return None
    format = format_of(rule or scheme.format)
    inner = leaf.value.shape[-2]
    try:
        rows = format.group(inner, group if rule is None else None)
    except InputError as error:
        raise InputError(f"{leaf.names[0]} {list(leaf.value.shape)}: {error}") from None
    method = scheme.method
    if method in ("awq", "gptq"):
        method = method if format.name in WHOLE_NUMBERS else "nearest"
    elif rule is not None:
        method = "nearest"
    return Target(format, rows, method, scheme.activations if rule is None else None)
