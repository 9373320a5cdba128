"""What chips must tell each other, by the textbook formula of each kind of parallelism.

Per layer and pass over x = [rows, tokens, d_model] on a chip:

  tensor    two all-reduces of x: after attention and after the feed-forward (Megatron, arXiv:1909.08053); one more
            of x after the embedding, whose vocabulary is split
  expert    for few tokens a gather of x and a reduce-scatter of float32; for many two all-to-alls of those rows
            that a chip's experts serve: dispatch and combine (GShard, arXiv:2006.16668; `sharding.experts`)
  sequence  decoding: an all-reduce of attention's output and its two sums, in float32 (Flash-Decoding); prefill:
            keys and values go once around the ring (Ring Attention, arXiv:2310.01889)
  pipeline  x to the next stage at each tick; what the last stage says, to all
  data      nothing

Where chips of `tensor` share a key head, each may hold some rows or some tokens of its cache (Pope et al.,
arXiv:2211.05102): two all-to-alls of the queries' heads, or a gather of them and a sum of what each chip saw.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from jaxinf.aot import wires
from jaxinf.aot.plan.sizes import entry, heads, rows, shared, stage
from jaxinf.aot.plan.types import Case, Sizes, Use
from jaxinf.aot.slices import Slice
from jaxinf.layers import MoESpec, TokenChoice
from sharding.experts import exchanges, reached

_FLOAT32 = 4


def uses(case: Case, where: Slice, sizes: Sizes, tokens: float, *, ring: bool) -> tuple[Use, ...]:
    """The collectives of one pass over `tokens` tokens of each row.

    Args:
      ring: whether the pass's own tokens are split over `sequence` (a fresh prefill), not the cache alone.
    """
    b, sequence = rows(case, sizes), sizes.get("sequence", 1)
    local = tokens / sequence if ring else tokens
    x = math.ceil(b * local * case.spec.d_model * jnp.dtype(case.dtype).itemsize)
    counted: dict[tuple[str, str, int, int], float] = defaultdict(float)

    def add(axis: str, kind: str, size: float, times: float) -> None:
        if sizes.get(axis, 1) > 1 and times:
            counted[axis, kind, math.ceil(size), sizes[axis]] += times

    for layer, count in stage(case.spec, sizes):
        layers = count * ticks(case, sizes)[0]
        micro = micro_batches(case, sizes)
        add("tensor", "all-reduce", x / micro, 2 * layers)
        if isinstance(layer.ffn, MoESpec):
            for kind, size, times in _experts(case, layer.ffn, b * local / micro, sizes.get("expert", 1)):
                add("expert", kind, size, times * layers)
        attention = layer.attention
        q, _ = heads(attention, sizes)
        placement, group = shared(case, attention, sizes)
        if placement == "batch" and not ring:
            size = b * tokens * q * attention.head_dim * jnp.dtype(case.dtype).itemsize
            counted["tensor", "all-to-all", math.ceil(size / micro), group] += 2 * layers
        elif placement == "sequence" and not ring:
            size = group * b * tokens * q * (attention.head_dim + 2) * _FLOAT32
            counted["tensor", "reduce-scatter", math.ceil(size / micro), group] += layers
            size = group * b * tokens * q * attention.head_dim * jnp.dtype(case.dtype).itemsize
            counted["tensor", "all-gather", math.ceil(size / micro), group] += layers
        if attention.window is None or ring:
            if ring:
                chunk = b * local * entry(case, attention, sizes)
                add("sequence", "collective-permute", chunk / micro, (sequence - 1) * layers)
            else:
                out = b * tokens * q * (attention.head_dim + 2) * _FLOAT32
                add("sequence", "all-reduce", out / micro, layers)
    add("tensor", "all-reduce", x, 1)
    steps, micro = ticks(case, sizes)[1], micro_batches(case, sizes)
    add("pipeline", "collective-permute", x / micro, steps)
    add("pipeline", "all-reduce", x, 1)
    return tuple(_use(where, sizes, *key, times) for key, times in counted.items())


def _experts(case: Case, ffn: MoESpec, tokens: float, chips: int) -> Iterator[tuple[str, float, int]]:
    """`(kind, bytes, times)` of a mixture's collectives for so many tokens of a chip; see `sharding.experts`."""
    item, d, router = jnp.dtype(case.dtype).itemsize, case.spec.d_model, ffn.router
    together = tokens * chips * d
    if isinstance(router, TokenChoice):
        choice = dict(experts=ffn.experts, top_k=router.top_k)
        if exchanges(math.ceil(tokens), d, item, chips, **choice):
            yield "all-to-all", together * reached(ffn.experts, router.top_k, chips) * item, 2
            return
    yield "all-gather", together * item, 1
    yield "reduce-scatter", together * _FLOAT32, 1


def micro_batches(case: Case, sizes: Sizes) -> int:
    """Parts of the batch that are in the pipeline's stages at once."""
    held = rows(case, sizes)
    return max(m for m in range(1, sizes.get("pipeline", 1) + 1) if held % m == 0)


def ticks(case: Case, sizes: Sizes) -> tuple[int, int]:
    """`(how often a stage works in a pass, how often it works or waits)`."""
    micro = micro_batches(case, sizes)
    return micro, micro + sizes.get("pipeline", 1) - 1


def _use(where: Slice, sizes: Sizes, axis: str, kind: str, size: int, chips: int, times: float) -> Use:
    ways = wires.part(wires.ways(where, sizes)[axis], chips)
    each = wires.seconds(kind, size, ways)
    return Use(axis, kind, size, chips, round(times), times * sent(kind, size, chips), times * each)


def sent(kind: str, size: float, chips: int) -> float:
    """Bytes that a chip sends, by the ring algorithm."""
    others = (chips - 1) / chips
    return size * {"all-reduce": 2 * others, "collective-permute": 1.0}.get(kind, others)


def repeated(found: Iterable[Use], times: float) -> tuple[Use, ...]:
    """The same, so many times."""
    return tuple(
        Use(u.axis, u.kind, u.bytes, u.chips, round(u.times * times), u.sent * times, u.seconds * times)
        for u in found
    )
