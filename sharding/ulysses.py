"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509): all-to-all between tokens and heads.

Each chip trades its part of the tokens of all heads for all tokens of its part of the heads, attends as if there
were one chip, and trades back.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention
from pallas_kernels.errors import InputError
from sharding.collectives import all_to_all, part, size
from sharding.zigzag import AXIS

HEADS, TOKENS = 1, 2


@overload
def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str = AXIS,
    lengths: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str = AXIS,
    lengths: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str = AXIS,
    lengths: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: bool = False,
):
    """The arguments and results of `ring_attention`, tokens in zig-zag order too.

    A key head that several chips need is sent to each of them.

    Raises:
      InputError: query heads that the axis does not divide; key heads that neither divide over it nor repeat.
    """
    chips, heads, groups = size(axis), q.shape[HEADS], k.shape[HEADS]
    mask: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap)
    if why := refusal(heads, groups, chips):
        raise InputError(f"{why}; use ring attention, or another size of {axis}.")
    k, v = (jnp.repeat(x, max(1, chips // groups), axis=HEADS) for x in (k, v))
    q, k, v = (_in_order(all_to_all(x, axis, HEADS, TOKENS), chips) for x in (q, k, v))
    sinks, alibi_slopes = (None if x is None else part(x, axis, 0) for x in (sinks, alibi_slopes))
    out, lse = flash_attention(
        q, k, v, lengths=lengths, sinks=sinks, alibi_slopes=alibi_slopes, return_lse=True, **mask
    )
    out = all_to_all(_in_zigzag(out, chips), axis, TOKENS, HEADS)
    return (out, all_to_all(_in_zigzag(lse, chips), axis, TOKENS, HEADS)) if return_lse else out


def refusal(heads: int, kv_heads: int, chips: int) -> str | None:
    """Why heads cannot be split over so many chips, or None."""
    if heads % chips:
        sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        return f"{heads} query heads do not divide over {chips} chips ({sizes} would)"
    if kv_heads % chips and chips % kv_heads:
        return f"{kv_heads} key heads neither divide over {chips} chips nor repeat to as many"
    return None


def _in_order(x: jax.Array, chips: int) -> jax.Array:
    """All chips' tokens along axis 2, a chip after the other, as they stand in the row."""
    x = x.reshape(*x.shape[:TOKENS], chips, 2, -1, *x.shape[TOKENS + 1 :])
    early, late = x[:, :, :, 0], x[:, :, ::-1, 1]
    x = jnp.concatenate([early, late], axis=TOKENS)
    return x.reshape(*x.shape[:TOKENS], -1, *x.shape[TOKENS + 2 :])


def _in_zigzag(x: jax.Array, chips: int) -> jax.Array:
    """The inverse of `_in_order`."""
    shape = x.shape
    x = x.reshape(*shape[:TOKENS], 2 * chips, -1, *shape[TOKENS + 1 :])
    early, late = x[:, :, :chips], x[:, :, chips:][:, :, ::-1]
    return jnp.stack([early, late], axis=TOKENS + 1).reshape(shape)
