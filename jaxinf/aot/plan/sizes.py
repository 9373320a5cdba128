"""Bytes and products of a model's part on one device of a mesh, from its spec alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import jax.numpy as jnp

from jaxinf import compression
from jaxinf.aot.plan.types import Case, Sizes
from jaxinf.cache import row_bytes, slot_bytes
from jaxinf.cache.choice import kv_placement
from jaxinf.checkpoint.parameters import abstract
from jaxinf.layers import AttentionSpec, ExpertChoice, LayerSpec, MoESpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec
from jaxinf.models.placing import placements
from jaxinf.quant import FIELDS
from pallas_kernels import chips
from pallas_kernels.vmem import bits
from sharding.placement import Dim, Placed

SCALE = 4  # bytes


@dataclass(frozen=True)
class Weight:
    """One parameter's part on a device, its layers together.

    Attributes:
      kind: "embedding", "head", "experts", "linear" (a matrix that every token is multiplied with) or "small".
      numbers: that the device holds. bytes: as stored.
      share: of an expert layer's tokens, how many a matrix serves: chosen experts over all; else 1.
    """

    kind: str
    numbers: int
    bytes: int
    share: float = 1.0
    choices: int = 0


@lru_cache(maxsize=8)
def _model(spec: ModelSpec, dtype: str, quantize: str | None) -> CausalLM:
    """The abstract model with each period of layers once: what is described, not how deep it is."""
    once = dataclasses.replace(spec, segments=tuple(dataclasses.replace(s, repeats=1) for s in spec.segments))
    model = abstract(once, jnp.dtype(dtype), "stacked")
    return model if quantize is None else compression.quantize(model, quantize)


def placed(case: Case, sizes: Sizes) -> Iterator[tuple[Placed, tuple[int, ...]]]:
    """Every parameter with the shape of its part on a device. Stacks have all their layers.

    Raises:
      InputError: the mesh does not divide the model.
    """
    model = _model(case.spec, case.dtype, case.quantize)
    model.spec = case.spec
    for each in placements(model, sizes):
        dims = list(each.dims)
        if each.path[0] == "segments":
            dims[0] = Dim(case.spec.segments[int(each.path[1])].repeats)
        shape = []
        for dim, axes in zip(dims, (*each.partition, *[None] * len(dims)), strict=False):
            names = () if axes is None else (axes,) if isinstance(axes, str) else axes
            shape.append(dim.placed // math.prod(sizes.get(name, 1) for name in names))
        yield dataclasses.replace(each, dims=tuple(dims)), tuple(shape)


def weights(case: Case, sizes: Sizes) -> tuple[Weight, ...]:
    """The parameters' parts on one device."""
    return tuple(_weight(case, each, shape) for each, shape in placed(case, sizes))


def _weight(case: Case, each: Placed, shape: tuple[int, ...]) -> Weight:
    path, numbers = each.path, math.prod(shape)
    size = numbers * bits(each.dtype.name) // 8
    quantised = path[-1] in FIELDS
    if quantised:
        # Scales and their like are read with the codes, and are no numbers to multiply with.
        numbers, path = (numbers if path[-1] == "values" else 0), path[:-1]
    if path[0] == "embed" or path[0] == "positions":
        return Weight("embedding", numbers, size)
    layers = path[0] == "segments"
    matrix = quantised or len(shape) - layers >= 2
    if not matrix or path[-1] not in ("kernel", "up", "gate", "down"):
        return Weight("small", numbers, size)
    if path[0] == "head":
        return Weight("head", numbers, size)
    if "experts" in path:
        ffn = case.spec.segments[int(path[1])].period[int(path[3])].ffn
        assert isinstance(ffn, MoESpec)
        k = chosen(ffn)
        return Weight("experts", numbers, size, min(1.0, k / ffn.experts), ffn.experts)
    return Weight("linear", numbers, size)


def chosen(ffn: MoESpec) -> float:
    """Experts that a token goes to."""
    router = ffn.router
    if isinstance(router, TokenChoice):
        return router.top_k
    assert isinstance(router, ExpertChoice)
    return router.capacity_factor


def touched(share: float, tokens: float) -> float:
    """Of all experts, the share that some token chooses, choices being independent and equally likely."""
    return 1.0 - (1.0 - share) ** tokens


def rows(case: Case, sizes: Sizes) -> int:
    """Rows of the batch on a device."""
    return math.ceil(case.batch / (sizes.get("data", 1) * sizes.get("expert", 1)))


def group(case: Case, sizes: Sizes) -> float:
    """Rows whose tokens meet at an expert."""
    return max(1.0, case.batch / sizes.get("data", 1))


def heads(attention: AttentionSpec, sizes: Sizes) -> tuple[int, int]:
    """Query heads and key heads of a layer on a device."""
    ways = sizes.get("tensor", 1)
    return attention.heads // ways, max(1, attention.kv_heads // ways)


def shared(case: Case, attention: AttentionSpec, sizes: Sizes) -> tuple[str, int]:
    """How chips of `tensor` hold the cache of a key head that they share (see `kv_placement`), and how many do."""
    tensor = sizes.get("tensor", 1)
    full = attention.window is None
    placement = kv_placement(
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        batch=rows(case, sizes),
        capacity=case.context if attention.window is None else min(attention.window, case.context),
        tensor=tensor,
        itemsize=jnp.dtype(case.dtype).itemsize,
        striped=full,
        slot=slot_bytes(case.cache, attention.head_dim, case.dtype),
    )
    return placement, max(1, tensor // attention.kv_heads)


def held(case: Case, attention: AttentionSpec, sizes: Sizes) -> tuple[float, int]:
    """Rows and slots of a layer's cache on a device; slots come in whole tiles."""
    placement, group = shared(case, attention, sizes)
    kept = rows(case, sizes) / (group if placement == "batch" else 1)
    if attention.window is not None and (attention.window < case.context or sizes.get("sequence", 1) > 1):
        return kept, _tiles(min(attention.window, case.context))
    ways = sizes.get("sequence", 1) * (group if placement == "sequence" else 1)
    return kept, _tiles(math.ceil(case.context / ways))


def _tiles(slots: int) -> int:
    return slots + -slots % chips.LANES


def read(case: Case, attention: AttentionSpec, context: float, sizes: Sizes) -> float:
    """Cached tokens that a device reads, of all its rows, for a query in each row after `context` others."""
    placement, group = shared(case, attention, sizes)
    ways = group if placement != "replicate" else 1
    if attention.window is not None and attention.window < context:
        return rows(case, sizes) * attention.window / ways
    return rows(case, sizes) * context / sizes.get("sequence", 1) / ways


def entry(case: Case, attention: AttentionSpec, sizes: Sizes) -> float:
    """Bytes of a token's key and value in one layer on a device."""
    _, kv = heads(attention, sizes)
    return 2.0 * kv * slot_bytes(case.cache, attention.head_dim, case.dtype)


def stage(spec: ModelSpec, sizes: Sizes) -> Iterator[tuple[LayerSpec, float]]:
    """The kinds of layers and how many of each a stage of the pipeline holds, on average."""
    ways = sizes.get("pipeline", 1)
    for segment in spec.segments:
        for layer in segment.period:
            yield layer, segment.repeats / ways


def cache_bytes(case: Case, sizes: Sizes) -> int:
    """The cache's part on a device."""
    total = 0.0
    for layer, count in stage(case.spec, sizes):
        kept, slots = held(case, layer.attention, sizes)
        total += count * kept * slots * entry(case, layer.attention, sizes)
        _, kv = heads(layer.attention, sizes)
        total += count * kept * kv * row_bytes(case.cache, layer.attention.head_dim, case.dtype)
    return math.ceil(total)


def activation_bytes(case: Case, sizes: Sizes, tokens: int) -> int:
    """An estimate of what a pass over so many tokens a device needs besides weights and cache."""
    item = jnp.dtype(case.dtype).itemsize
    widest = 0
    for layer, _ in stage(case.spec, sizes):
        q, kv = heads(layer.attention, sizes)
        ffn = layer.ffn
        width = ffn.width // sizes.get("tensor", 1) * (chosen(ffn) if isinstance(ffn, MoESpec) else 1)
        widest = max(widest, (q + 2 * kv) * layer.attention.head_dim, math.ceil(3 * width))
    vocab = math.ceil(case.spec.vocab / sizes.get("tensor", 1))
    return tokens * item * (3 * case.spec.d_model + widest) + 2 * SCALE * rows(case, sizes) * vocab
