"""Checks of arguments, shared by the ops. Every message names what was given and what is allowed.

Shapes and dtypes are always checked. Values (lengths, layer indices) are checked where they are known, that is
outside `jit`; inside it each op documents what it does with values out of range.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.errors import InputError

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
QUANTIZED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def names(dtypes) -> str:
    return ", ".join(jnp.dtype(d).name for d in dtypes)


def check_dtype(name: str, x: Any, allowed) -> None:
    if not any(x.dtype == d for d in allowed):
        raise InputError(f"{name}.dtype={x.dtype.name}, but only {names(allowed)} are supported: cast it first.")


def check_shape(name: str, x: Any, shape: tuple[int | None, ...], letters: str) -> None:
    """Refuses x unless its shape is `shape`, where None allows any size; `letters` names the axes."""
    given = jnp.shape(x)
    if len(given) != len(shape) or any(want not in (None, have) for want, have in zip(shape, given, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"{name}.shape={given}, but [{letters}] must be ({wanted}).")


def integers(name: str, x: Any, shape: tuple[int | None, ...], letters: str) -> jax.Array:
    """x as int32 of the given shape."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(f"{name}.dtype={x.dtype.name}, but it must be an integer type: use int32.")
    check_shape(name, x, shape, letters)
    return x.astype(jnp.int32)


def booleans(name: str, x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype != jnp.bool_:
        raise InputError(f"{name}.dtype={x.dtype.name}, but it must be bool: true where a key is visible.")
    return x


def ancestors(name: str, x: Any, batch: int, queries: int) -> jax.Array | None:
    """An ancestor mask as bool [B | 1, T, T]."""
    if x is None:
        return None
    x = booleans(name, x)
    x = x[None] if x.ndim == 2 else x
    if x.shape not in ((1, queries, queries), (batch, queries, queries)):
        raise InputError(
            f"{name}.shape={x.shape}, but it must be [{queries}, {queries}] or [{batch}, {queries}, {queries}]."
        )
    return x


def per_head(name: str, x: Any, heads: int) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"{name}.dtype={x.dtype.name}, but it must be float32 of shape [{heads}].")
    check_shape(name, x, (heads,), "N")
    return x.astype(jnp.float32)


def known(x: Any) -> np.ndarray | None:
    """The value of x where it is known while tracing, else None."""
    return None if isinstance(x, Tracer) else np.asarray(x)


def check_range(name: str, x: Any, low: int, high: int | None, advice: str) -> None:
    """Refuses known values outside low..high, both allowed; traced values pass."""
    value = known(x)
    if value is None or value.size == 0:
        return
    if value.min() < low or (high is not None and value.max() > high):
        top = "" if high is None else f"..{high}"
        raise InputError(f"{name}={value.tolist()}, but {low}{top or ' or more'} is allowed: {advice}.")


def stacked_layer(name: str, x: jax.Array, layer: Any) -> tuple[bool, jax.Array]:
    """Whether the cache x is stacked, [L, B, K, S, D] with a layer, and the layer as an int32 scalar."""
    if x.ndim not in (4, 5):
        raise InputError(f"{name}.shape={x.shape}, but a cache is [B, K, S, D], or [L, B, K, S, D] with layer=.")
    if (x.ndim == 5) != (layer is not None):
        need = "needs layer=0.." + str(x.shape[0] - 1) if x.ndim == 5 else "takes no layer: pass layer=None"
        raise InputError(f"{name}.shape={x.shape} and layer={layer}, but a cache of {x.ndim} axes {need}.")
    index = integers("layer", 0 if layer is None else layer, (), "")
    if x.ndim == 5:
        check_range("layer", index, 0, x.shape[0] - 1, f"{name} stacks {x.shape[0]} layers")
    return x.ndim == 5, index


def check_heads(query_heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or query_heads % kv_heads:
        raise InputError(
            f"q has {query_heads} heads and k has {kv_heads}, but q's must be a multiple of k's: check the shapes."
        )


def positive(name: str, x: float | None) -> float | None:
    if x is not None and not (math.isfinite(x) and x > 0):
        raise InputError(f"{name}={x}, but it must be a finite number above 0, or None.")
    return None if x is None else float(x)


def window_sides(window: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own position a query sees; None means no limit."""
    if window is None:
        return None, None
    if isinstance(window, tuple):
        if len(window) != 2 or any(side is not None and side < 0 for side in window):
            raise InputError(f"window={window}, but (left, right) must be two numbers of 0 or more, or None.")
        left, right = window
        return None if left is None else int(left), None if right is None else int(right)
    if window < 1:
        raise InputError(f"window={window}, but it counts the query's own key, so it must be 1 or more, or None.")
    return int(window) - 1, 0
