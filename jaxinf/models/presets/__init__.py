"""Published architectures by name, as data."""

from __future__ import annotations

from collections.abc import Callable

from jaxinf.models.presets import dense, gemma, mixtures
from jaxinf.models.spec import ModelSpec
from pallas_kernels.errors import InputError

_PRESETS: dict[str, Callable[[], ModelSpec]] = {**dense.PRESETS, **gemma.PRESETS, **mixtures.PRESETS}


def names() -> tuple[str, ...]:
    """The names that `preset` knows, sorted."""
    return tuple(sorted(_PRESETS))


def preset(name: str) -> ModelSpec:
    """The architecture published as `name`.

    Raises:
      InputError: there is no such preset; the message lists those that exist.
    """
    if name not in _PRESETS:
        raise InputError(f"preset {name!r} does not exist; there are {', '.join(names())}")
    return _PRESETS[name]()


__all__ = ["names", "preset"]
