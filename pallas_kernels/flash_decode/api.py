"""Attention of the newest few tokens over a cache: decoding, and verification of drafted tokens."""

from functools import partial
from typing import Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.errors import InputError
from pallas_kernels.flash_decode.blocks import Blocks, misfits
from pallas_kernels.flash_decode.kernel import pallas
from pallas_kernels.flash_decode.reference import reference
from pallas_kernels.flash_decode.xla import xla
from pallas_kernels.masks import Rules
from pallas_kernels.stored import STORED
from pallas_kernels.validate import (
    FLOATS,
    ancestors,
    check_dtype,
    check_heads,
    check_range,
    check_shape,
    integers,
    per_head,
    positive,
    stacked_layer,
    window_sides,
)


@overload
def flash_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    ring: bool = False,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def flash_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    ring: bool = False,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def flash_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    ring: bool = False,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
):
    """Causal attention of each row's newest T tokens over its cache, which already holds them.

    Args:
      q: [B, N, T, D], float32, bfloat16 or float16; query t of row b is at position lengths[b] - T + t.
      k: [B, K, S, D], or stacked [L, B, K, S, D] with `layer`; N a multiple of K. float32, bfloat16, float16, int8,
        float8, or uint16 for the bits of bfloat16, which a CPU appends to in place.
      v: the same with Dv for D, in k's dtype. Where keys and values are one array (latent attention), pass k
        itself: the kernel reads it once.
      lengths: int32 [B], tokens of each row, the T new ones among them, 0..S+T (a ring: 0 or more). Slots beyond
        S do not exist, so a row whose last queries are padding may count them. At 0 the row is empty.
      layer: which layer of a stacked cache, 0..L-1; may be traced (out of range then means the nearest layer).
      k_scale, v_scale: float32 [B, K, S] or [L, B, K, S]; k stands for k * k_scale. An int8 cache needs both.
      window, softcap, sinks, alibi_slopes, scale: as for `flash_attention`.
      ancestor_mask: bool [T, T] or [B, T, T], the new tokens as a tree; as for `flash_attention`.
      return_lse: also return the log-sum-exp of the scores, sinks included.
      ring: position p lives in slot p % S, so that slot s holds the largest position below lengths[b] that is
        s modulo S. Slots with no such position are unused.
      blocks: slots of the cache that are read at a time; None chooses.
      implementation: "reference", "xla", "pallas" or "interpret" (the kernel in the TPU interpreter); None takes
        the kernel on TPUs and "xla" elsewhere.

    Returns:
      out [B, N, T, Dv] in q's dtype, and, if asked for, lse float32 [B, N, T]. A query that sees no key gives 0
      and -inf (with sinks: 0 and the sink). Slots that no query of a row sees may hold NaN. Reverse-mode
      differentiation is not offered: train with `flash_attention`.

    Raises:
      InputError: shapes, dtypes or values that do not fit, the argument named.
      UnsupportedError: "pallas" or "interpret" was asked for and the kernel cannot serve the call.
    """
    check_dtype("q", q, FLOATS)
    check_shape("q", q, (None, None, None, None), "B, N, T, D")
    batch, heads, tokens, dim = q.shape
    check_dtype("k", k, STORED)
    stacked, layer = stacked_layer("k", k, layer)
    lead = k.shape[:1] if stacked else ()
    letters = "L, " if stacked else ""
    check_shape("k", k, (*lead, batch, None, None, dim), letters + "B, K, S, D")
    groups, slots = k.shape[-3:-1]
    check_shape("v", v, (*lead, batch, groups, slots, None), letters + "B, K, S, Dv")
    check_heads(heads, groups)
    if v.dtype != k.dtype:
        raise InputError(f"k and v have dtypes {k.dtype.name} and {v.dtype.name}, but they must be equal.")
    if k.dtype == jnp.int8 and (k_scale is None or v_scale is None):
        raise InputError("The cache is int8 and has no scales, but k_scale and v_scale of [B, K, S] are needed.")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None:
            check_dtype(name, x, (jnp.float32,))
            check_shape(name, x, (*lead, batch, groups, slots), letters + "B, K, S")
    lengths = integers("lengths", lengths, (batch,), "B")
    advice = "each counts its row's tokens, the new ones included"
    check_range("lengths", lengths, 0, None if ring else slots + tokens, advice)
    left, right = window_sides(window)
    rules = Rules(
        queries=tokens,
        keys=slots,
        causal=True,
        left=left,
        right=right,
        q_offset=lengths - tokens,
        lengths=lengths,
        ancestors=ancestors("ancestor_mask", ancestor_mask, batch, tokens),
    )
    sinks = None if sinks is None else per_head("sinks", sinks, heads)
    alibi_slopes = None if alibi_slopes is None else per_head("alibi_slopes", alibi_slopes, heads)
    scale = positive("scale", dim**-0.5 if scale is None else scale)
    assert scale is not None
    softcap = positive("softcap", softcap)
    shared = v is k
    if not stacked:
        k, v = k[None], v[None]
        k_scale, v_scale = (None if x is None else x[None] for x in (k_scale, v_scale))
    check_implementation(implementation)
    common = dict(scale=scale, softcap=softcap, ring=ring)

    def results(form, q, k, v, *rest, **options):
        return form(q, k, k if v is None else v, *rest, **common, **options)[: 1 + return_lse]

    # Zero-sized arrays have one answer, and no kernel.
    out = dispatch(
        "flash_decode",
        "reference" if 0 in (*q.shape, *v.shape) else implementation,
        *(q, k, None if shared else v, layer, k_scale, v_scale, sinks, alibi_slopes, rules),
        reference=partial(results, reference),
        xla=partial(results, xla, blocks=blocks),
        pallas=partial(pallas, blocks=blocks, return_lse=return_lse, **common),
        unsupported=_unsupported(k, batch, blocks),
    )
    return tuple(out) if return_lse else out[0]


def _unsupported(k: jax.Array, batch: int, blocks: Blocks | None) -> list[str]:
    """Why the kernel cannot serve a call."""
    reasons = []
    if k.dtype == jnp.float16:
        reasons.append("a float16 cache has no vector loads on TPUs: store bfloat16 or float32")
    return reasons + ([] if blocks is None else misfits(batch, blocks))
