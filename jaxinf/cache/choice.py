"""Which cache a layer gets, on the mesh in context."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxinf.cache.base import LayerCache
from jaxinf.cache.dense import DenseCache
from jaxinf.cache.kinds import Kind, check_kind, slot_bytes
from jaxinf.cache.rolling import RollingCache, SinkCache
from jaxinf.cache.sharded import BatchSharded, SequenceSharded
from pallas_kernels import chips
from sharding.collectives import size

Placement = Literal["replicate", "sequence", "batch"]

HBM_PER_LINK = 16
"""Bytes that HBM delivers while one goes over a link: 819 / 50 GB/s on a v5e, 1640 / 100 on a v6e (peak rates from
cloud.google.com/tpu/docs)."""


def kv_placement(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    capacity: int,
    tensor: int,
    itemsize: int = 2,
    striped: bool = True,
    slot: float | None = None,
) -> Placement:
    """How the chips of `tensor` hold the cache of a layer that has fewer key heads than there are chips.

    Groups of g = tensor / kv_heads chips share a key head. Of a decode step it compares, for n = heads / tensor
    query heads a chip, B rows, S slots of c bytes, queries of D channels of i bytes,

        replicate: 2 B S c
        sequence:  2 B ceil(S / g) c + HBM_PER_LINK (g - 1) B n (D i + 4 D + 8)   queries there, float32 back
        batch:     2 (B / g) S c     + HBM_PER_LINK 2 (g - 1) / g B n D i         all-to-all there and back

    bytes a chip: what it reads of its cache, and what it sends, in bytes of HBM that take as long (Pope et al.
    2023, arXiv:2211.05102, section 3.3, compare the first and the last). The least wins; in a tie the earlier one.

    Args:
      batch: rows on each chip. striped: whether splitting by tokens is allowed.
      slot: c, bytes of a token's key or value in one head; None: D i.
    """
    group = max(1, tensor // kv_heads)
    if group == 1:
        return "replicate"
    queries = batch * heads // tensor * head_dim * itemsize
    cache = 2 * batch * (head_dim * itemsize if slot is None else slot)
    costs: dict[Placement, float] = {"replicate": float(cache * capacity)}
    if striped:
        sums = batch * heads // tensor * (4 * head_dim + 8)
        costs["sequence"] = cache * -(-capacity // group) + HBM_PER_LINK * (group - 1) * (queries + sums)
    if batch % group == 0:
        costs["batch"] = cache / group * capacity + HBM_PER_LINK * 2 * (group - 1) / group * queries
    return min(costs, key=lambda name: costs[name])


def layer_cache(
    layers: int | None,
    batch: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    dtype,
    max_append: int = 1,
    window: int | None = None,
    bound: int | None = None,
    sinks: int = 0,
    kind: Kind | None = None,
) -> LayerCache:
    """One chip's part of an empty cache.

    Without a mesh in context that is all of it. On one, a chip has its key heads, or one that it shares; tokens are
    striped over `sequence` unless a window forgets most of them anyway; and what key heads are shared by chips of
    `tensor` lies where `kv_placement` says.

    Args:
      layers: stacked; None: one, not stacked. batch: rows on each chip.
      heads, kv_heads: of the whole model. capacity: tokens of a row, on all chips.
      dtype: of the model's keys and values, and of what is stored unless a kind says otherwise.
      window: of the layer. bound, sinks: keep only so many latest and first tokens of a layer without a window.
      kind: "int8", "fp8" or "int4": stored in fewer bits; None: in `dtype`.
    """
    check_kind("kind", kind)
    # A TPU lays out whole tiles of slots; other numbers of them it would re-lay, copying the cache at every write.
    tile = chips.LANES if chips.platform() == "tpu" else 1
    tensor, sequence = size("tensor"), size("sequence")
    group = max(1, tensor // kv_heads)
    kept = bound if window is None else min(window, capacity)
    # A window that keeps every token masks nothing; yet over `sequence` it is what all chips have whole.
    rolling = kept is not None and (kept + max_append - 1 < capacity or window is None or sequence > 1)
    placement = "replicate"
    if not sinks:
        placement = kv_placement(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            batch=batch,
            capacity=kept + max_append - 1 if rolling and kept is not None else capacity,
            tensor=tensor,
            itemsize=jnp.dtype(dtype).itemsize,
            striped=kept is None,
            slot=slot_bytes(kind, head_dim, dtype),
        )
    rows = batch // group if placement == "batch" else batch
    shape = (layers, rows, max(1, kv_heads // tensor))

    def whole(slots: int) -> int:
        return slots + -slots % tile

    if rolling and kept is not None:
        spare = whole(kept + max_append - 1) - kept + 1
        if sinks:
            return SinkCache.zeros(*shape, kept, head_dim, dtype, sinks=sinks, max_append=spare, kind=kind)
        cache = RollingCache.zeros(*shape, kept, head_dim, dtype, max_append=spare, kind=kind)
    else:
        shared = group if placement == "sequence" else 1
        if sequence * shared > 1:
            slots = whole(-(-capacity // (sequence * shared)))
            cache = SequenceSharded.zeros(*shape, slots, head_dim, dtype, group=shared, kind=kind)
        else:
            cache = DenseCache.zeros(*shape, whole(capacity), head_dim, dtype, kind=kind)
    return BatchSharded(cache, group) if placement == "batch" else cache
