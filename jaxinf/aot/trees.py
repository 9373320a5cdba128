"""The structure of arguments and results as JSON, without pickle."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax

from pallas_kernels.errors import InputError

_PACKAGES = ("jaxinf.", "sharding.", "pallas_kernels.")


def to_json(tree: Any) -> Any:
    """A record of a `jax.tree.structure` of tuples, lists, dicts, None and dataclasses of this project."""
    return _write(jax.tree.unflatten(tree, [_LEAF] * tree.num_leaves))


def from_json(record: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
      InputError: it is no such record.
    """
    try:
        return jax.tree.structure(_read(record))
    except (KeyError, TypeError, ValueError, ImportError, AttributeError) as e:
        raise InputError(f"{str(record)[:80]!r} describes no structure of arrays: {e}") from e


class _Leaf:
    """Stands for an array."""


_LEAF = _Leaf()


def _write(value: Any) -> Any:
    if value is _LEAF:
        return "array"
    if value is None:
        return None
    if isinstance(value, (bool, int, float, str)):  # of a dataclass, a field that is no part of the tree
        return {"scalar": value}
    if isinstance(value, dict):
        return {"dict": [[key, _write(x)] for key, x in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_write(x) for x in value]}
    kind = type(value)
    if not dataclasses.is_dataclass(kind) or not kind.__module__.startswith(_PACKAGES):
        raise InputError(f"a {kind.__name__} cannot be recorded: it is no dataclass of this project")
    fields = {field.name: _write(getattr(value, field.name)) for field in dataclasses.fields(kind)}
    return {"type": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}


def _read(record: Any) -> Any:
    if record == "array":
        return _LEAF
    if record is None:
        return None
    if "scalar" in record:
        return record["scalar"]
    if "dict" in record:
        return {key: _read(x) for key, x in record["dict"]}
    if "tuple" in record:
        return tuple(_read(x) for x in record["tuple"])
    if "list" in record:
        return [_read(x) for x in record["list"]]
    module, _, name = record["type"].partition(":")
    if not module.startswith(_PACKAGES):
        raise ValueError(f"{module} is not of this project")
    kind = getattr(importlib.import_module(module), name)
    if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
        raise ValueError(f"{name} is no dataclass")
    made = object.__new__(kind)  # what checks shapes as it is made would find none
    for field, x in record["fields"].items():
        object.__setattr__(made, field, _read(x))
    return made
