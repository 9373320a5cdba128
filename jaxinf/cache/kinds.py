"""The kinds of caches that store fewer bits than they are computed with, by name."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp

from jaxinf.cache.grouped import GROUP, RECENT, Grouped
from jaxinf.cache.scaled import Scaled
from jaxinf.cache.store import Floats, Store
from pallas_kernels.errors import InputError

Kind = Literal["int8", "fp8", "int4"]
KINDS: tuple[str, ...] = get_args(Kind)

_SCALE = 4  # bytes


def check_kind(name: str, kind: str | None) -> None:
    """Whether `kind` is a kind of cache, or None.

    Raises:
      InputError: it is not; lists them.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"{name}={kind!r} must be {', '.join(map(repr, KINDS))}, or None for the model's dtype.")


def slot_bytes(kind: str | None, head_dim: int, dtype) -> float:
    """Bytes of one token's key and value, half of them both, in one head of one layer, scales included."""
    if kind is None:
        return head_dim * float(jnp.dtype(dtype).itemsize)
    if kind != "int4":
        return head_dim + float(_SCALE)
    return head_dim / 2 + _SCALE * (head_dim / GROUP + 1) / 2


def row_bytes(kind: str | None, head_dim: int, dtype) -> float:
    """Bytes of a row in one head of one layer besides those of its tokens, keys and values together."""
    return float(2 * RECENT * head_dim * jnp.dtype(dtype).itemsize) if kind == "int4" else 0.0


def ring_spare(kind: str | None) -> int:
    """Slots that a ring needs besides those of its tokens: a group is rounded with tokens that are long gone."""
    return GROUP if kind == "int4" else 0


def empty(shape: tuple[int | None, ...], dtype, kind: Kind | None) -> Store:
    """A store of zeros, `[L, B, K, S, D]`, perhaps with more slots; L may be None. dtype: of floats."""
    check_kind("kind", kind)
    sizes = tuple(n for n in shape if n is not None)
    if kind is None:
        return Floats.zeros(sizes, dtype)
    if kind == "int4":
        return Grouped.zeros(sizes, dtype)
    return Scaled.zeros(sizes, {"int8": "int8", "fp8": "float8_e4m3fn"}[kind])
