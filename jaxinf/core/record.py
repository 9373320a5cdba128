"""Frozen dataclasses to plain JSON records and back, checked on the way in."""

import dataclasses
import types
import typing
from typing import Any

from pallas_kernels.errors import InputError


def to_record(value: Any) -> Any:
    """A JSON-able record of `value`: dataclasses become `{"type": name, field: ...}`, tuples become lists.

    Fields that hold their default are left out, so that a new field does not change old records.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_record(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != _default(f)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [to_record(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"cannot record a {type(value).__name__}: only dataclasses, sequences and scalars")


def from_record(cls: type, record: Any, *, at: str = "spec") -> Any:
    """The inverse of `to_record` for a value of type `cls`.

    Args:
      cls: the dataclass expected at the root; nested types come from its annotations.
      record: what `to_record` returned, perhaps through JSON.
      at: how to call the root in error messages.

    Raises:
      InputError: an unknown type, an unknown or missing field, or a value of the wrong type.
    """
    return _read(cls, record, at)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _read(hint: Any, record: Any, at: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if record is None and type(None) in args:
            return None
        if isinstance(record, dict):
            named = {c.__name__: c for a in args for c in _concrete(a)}
            name = record.get("type")
            if name not in named:
                raise InputError(f"{at}: unknown type {name!r}; known: {', '.join(sorted(named))}")
            return _read(named[name], record, at)
        for arg in args:
            try:
                return _read(arg, record, at)
            except InputError:
                continue
        raise InputError(f"{at}={record!r} is none of {', '.join(map(str, args))}")
    if origin is tuple:
        if not isinstance(record, (list, tuple)):
            raise InputError(f"{at}={record!r} must be a list")
        item = args[0] if len(args) == 2 and args[1] is ... else None
        hints = [item] * len(record) if item else list(args)
        if len(hints) != len(record):
            raise InputError(f"{at} has {len(record)} items; {len(hints)} are expected")
        return tuple(_read(h, r, f"{at}[{i}]") for i, (h, r) in enumerate(zip(hints, record, strict=True)))
    if origin is typing.Literal:
        if record not in args:
            raise InputError(f"{at}={record!r} must be one of {', '.join(map(repr, args))}")
        return record
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, record, at)
    if hint is float and isinstance(record, int) and not isinstance(record, bool):
        return float(record)
    if hint in (int, float, str, bool) and type(record) is hint:
        return record
    raise InputError(f"{at}={record!r} must be of type {getattr(hint, '__name__', hint)}")


def _read_dataclass(cls: Any, record: Any, at: str) -> Any:
    if not isinstance(record, dict):
        raise InputError(f"{at}={record!r} must be a record of a {cls.__name__}")
    named = {c.__name__: c for c in _concrete(cls)}
    name = record.get("type", cls.__name__)
    if name not in named:
        raise InputError(f"{at}: unknown type {name!r}; known: {', '.join(sorted(named))}")
    cls = named[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {k: v for k, v in record.items() if k != "type"}
    if unknown := sorted(set(given) - set(fields)):
        raise InputError(f"{at}: {cls.__name__} has no field {', '.join(unknown)}; known: {', '.join(fields)}")
    missing = [n for n, f in fields.items() if n not in given and _default(f) is dataclasses.MISSING]
    if missing:
        raise InputError(f"{at}: {cls.__name__} needs {', '.join(missing)}")
    return cls(**{k: _read(hints[k], v, f"{at}.{k}") for k, v in given.items()})


def _concrete(hint: Any) -> list[Any]:
    """`hint` and its subclasses, where it is a dataclass."""
    if not isinstance(hint, type) or not dataclasses.is_dataclass(hint):
        return []
    return [hint, *(d for c in hint.__subclasses__() for d in _concrete(c))]
