"""Attention of many queries over many keys: prefill, chunked prefill, training."""

from typing import Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, check_implementation
from pallas_kernels.errors import InputError
from pallas_kernels.flash_attention.attention import Options, attend, one_layer
from pallas_kernels.flash_attention.blocks import Blocks
from pallas_kernels.flash_attention.reference import reference
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks
from pallas_kernels.masks import Rules
from pallas_kernels.validate import (
    FLOATS,
    ancestors,
    booleans,
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

_SIZES = {"xla": XlaBlocks, "pallas": Blocks, "interpret": Blocks}


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    q_offset: int | jax.Array | None = None,
    block_mask: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    blocks: Blocks | XlaBlocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    q_offset: int | jax.Array | None = None,
    block_mask: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    blocks: Blocks | XlaBlocks | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    q_offset: int | jax.Array | None = None,
    block_mask: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | XlaBlocks | None = None,
    implementation: Implementation | None = None,
):
    """Softmax attention of q over k and v; the formula is in `reference`.

    Args:
      q: [B, N, T, D], float32, bfloat16 or float16. float32 is multiplied at full precision.
      k: [B, K, S, D] of q's dtype, N a multiple of K; query head n reads key head n // (N / K).
      v: [B, K, S, Dv] of q's dtype.
      layer: of k and v that are stacked, [L, B, K, S, D], which layer is meant, 0..L-1; may be traced (out of range
        then means the nearest one). The kernel reads it where it lies.
      causal: a query sees no key after its own position.
      window: w: the query at p sees the keys p-w+1..p. (left, right): p-left..p+right, None for no limit.
      softcap: scores become softcap * tanh(score / softcap), before ALiBi is added.
      sinks: float32 [N], logits that take part in the softmax and carry no value.
      alibi_slopes: float32 [N]; slope * (key position - query position) is added to the scores.
      q_segment_ids, kv_segment_ids: int32 [B, T] and [B, S]; a query sees keys of its own segment.
      lengths: int32 [B], valid keys of each row, 0..S; under `jit` more than S means S.
      q_offset: position of q[:, :, 0] on the key axis, one for all or int32 [B]; default 0. May be negative.
      block_mask: bool [nq, nk] or [N, nq, nk]; cell (t // ceil(T / nq), s // ceil(S / nk)) must be true.
      ancestor_mask: bool [T, T] or [B, T, T]. The keys q_offset..q_offset+T-1 are nodes of a tree, and query t
        sees node t' where the mask is true, whatever the causal rule; the mask is true for the node itself. A
        node's position, for windows and ALiBi, is q_offset plus its depth.
      scale: of the dot products; default D ** -0.5.
      return_lse: also return the log-sum-exp of the scores, sinks included, so that partial results can merge.
      blocks: sizes, `Blocks` for the kernel or `XlaBlocks` for the XLA form; each chooses by itself without.
      implementation: "reference"; "xla", block by block in plain JAX; "pallas", the kernel for TPUs; "interpret",
        that kernel in JAX's interpreter. None: the kernel where the program is lowered for a TPU, else "xla".

    Returns:
      out [B, N, T, Dv] in q's dtype, and, if asked for, lse float32 [B, N, T]. A query that sees no key gives 0
      and -inf (with sinks: 0 and the sink). Keys that no query of a row sees may hold NaN; neither results nor
      gradients read them. Differentiable in q, k, v, sinks and alibi_slopes (reverse mode).

    Raises:
      InputError: shapes, dtypes or values that do not fit, the argument named; blocks that need more VMEM than the
        chip has.
      UnsupportedError: "pallas" or "interpret" was asked for and cannot do this call; it lists every reason.
    """
    check_dtype("q", q, FLOATS)
    check_shape("q", q, (None, None, None, None), "B, N, T, D")
    batch, heads, queries, dim = q.shape
    stacked, index = stacked_layer("k", k, layer)
    lead, letters = (k.shape[:1], "L, ") if stacked else ((), "")
    check_shape("k", k, (*lead, batch, None, None, dim), letters + "B, K, S, D")
    groups, keys = k.shape[-3:-1]
    check_shape("v", v, (*lead, batch, groups, keys, None), letters + "B, K, S, Dv")
    check_heads(heads, groups)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise InputError(
            f"q, k, v have dtypes {q.dtype.name}, {k.dtype.name}, {v.dtype.name}, but they must be equal."
        )
    if blocks is not None and implementation in _SIZES and not isinstance(blocks, _SIZES[implementation]):
        raise InputError(
            f"blocks={blocks}, but implementation={implementation!r} takes {_SIZES[implementation].__name__}."
        )
    left, right = window_sides(window)
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise InputError("One of q_segment_ids and kv_segment_ids was given, but both or neither are needed.")
    if q_segment_ids is not None:
        q_segment_ids = integers("q_segment_ids", q_segment_ids, (batch, queries), "B, T")
        kv_segment_ids = integers("kv_segment_ids", kv_segment_ids, (batch, keys), "B, S")
    if lengths is not None:
        lengths = integers("lengths", lengths, (batch,), "B")
        check_range("lengths", lengths, 0, keys, "each counts the valid keys of its row")
    offset = jnp.asarray(0 if q_offset is None else q_offset)
    offset = integers("q_offset", offset.reshape(1) if offset.ndim == 0 else offset, (None,), "B")
    if offset.shape[0] not in (1, batch):
        raise InputError(
            f"q_offset.shape={offset.shape}, but it must be one number or one for each of {batch} rows."
        )
    if block_mask is not None:
        block_mask = booleans("block_mask", block_mask)
        block_mask = block_mask[None] if block_mask.ndim == 2 else block_mask
        shape = block_mask.shape
        if (
            len(shape) != 3
            or shape[0] not in (1, heads)
            or not 1 <= shape[1] <= queries
            or not 1 <= shape[2] <= keys
        ):
            raise InputError(
                f"block_mask.shape={shape}, but it must be [nq, nk] or [{heads}, nq, nk] with nq of 1..{queries} "
                f"and nk of 1..{keys}."
            )
    rules = Rules(
        queries=queries,
        keys=keys,
        causal=causal,
        left=left,
        right=right,
        q_offset=offset,
        lengths=lengths,
        q_segments=q_segment_ids,
        kv_segments=kv_segment_ids,
        blocks=block_mask,
        ancestors=ancestors("ancestor_mask", ancestor_mask, batch, queries),
    )
    sinks = None if sinks is None else per_head("sinks", sinks, heads)
    alibi_slopes = None if alibi_slopes is None else per_head("alibi_slopes", alibi_slopes, heads)
    scale = positive("scale", dim**-0.5 if scale is None else scale)
    assert scale is not None
    softcap = positive("softcap", softcap)
    check_implementation(implementation)
    if implementation == "reference" or 0 in (*q.shape, *v.shape):
        k, v = (one_layer(x, index if stacked else None) for x in (k, v))
        out, lse = reference(q, k, v, sinks, alibi_slopes, rules, scale=scale, softcap=softcap)
    else:
        start = 0 if q_offset is None else q_offset
        known = int(start) if isinstance(start, int) else None
        options = Options(implementation, scale, softcap, known, blocks)
        chosen = jnp.clip(index, 0, k.shape[0] - 1) if stacked else None
        out, lse = attend(options, q, k, v, sinks, alibi_slopes, rules, chosen)
    return (out, lse) if return_lse else out
