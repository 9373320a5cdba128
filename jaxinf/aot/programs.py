"""Whole programs of a model, to be compiled for chips that are not here: prefill and the decode loop in one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxinf.aot import lowering, topology
from jaxinf.checkpoint.parameters import abstract
from jaxinf.generation import loop
from jaxinf.layers import FFNSpec, LayerSpec, MoESpec
from jaxinf.models import ModelSpec, Segment, presets
from jaxinf.models.causal_lm import init_cache
from pallas_kernels.errors import InputError
from sharding import row_major


@dataclass(frozen=True)
class Generation:
    """A compiled prefill-and-decode program, and what it keeps.

    Attributes:
      weights, cache: bytes on the device.
    """

    compiled: lowering.Compiled
    weights: int
    cache: int

    @property
    def temporaries(self) -> float:
        """Bytes of temporaries over those of the cache: near 0 where the cache is never copied."""
        return self.compiled.memory.temporaries / self.cache


def generation(
    model: str | ModelSpec,
    *,
    chip: str = "v5e",
    batch: int = 8,
    prompt: int = 1024,
    new_tokens: int = 128,
    capacity: int | None = None,
    ways: int = 1,
    piece: int = loop.PIECE,
    dtype: Any = "bfloat16",
) -> Generation:
    """Compiles `jaxinf.generation.loop.generate` for one device: ragged prompts in pieces, then the decode loop.

    Args:
      model: a preset's name or a spec.
      batch, prompt: rows, and tokens of the longest prompt.
      capacity: tokens a row that the cache has room for; default: prompt + new_tokens.
      ways: compile what one chip of so many computes under tensor parallelism, without its collectives.
      piece: tokens of a prompt that one pass takes; activations grow with it.
      dtype: of weights and cache.

    Raises:
      TooLarge: it does not fit the chip.
      InputError: no such preset or chip; sizes that the model cannot be cut by.
    """
    spec = presets.preset(model) if isinstance(model, str) else model
    spec = spec if ways == 1 else shard(spec, ways)
    dtype = jnp.dtype(dtype)
    capacity = prompt + new_tokens if capacity is None else capacity
    mesh = topology.mesh(chip)
    device = NamedSharding(mesh, PartitionSpec())
    with lowering.use(mesh):
        graph, state = nnx.split(abstract(spec, dtype, "stacked"))
        weights, tree = jax.tree.flatten(state)
        cache = jax.eval_shape(lambda: init_cache(spec, batch, capacity, dtype=dtype, layout="stacked"))

    def generate(weights, tokens, counts, cache):
        model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        return loop.generate(model, tokens, counts, cache, max_new_tokens=new_tokens, piece=piece)

    tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    weights = [jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=row_major(w.ndim, device)) for w in weights]
    cache = jax.tree.map(lambda c: jax.ShapeDtypeStruct(c.shape, c.dtype), cache)  # as the device lays it out
    compiled = lowering.lower(generate, weights, tokens, counts, cache, chip=chip, donate=(3,))
    return Generation(compiled, _bytes(weights), _bytes(cache))


def shard(spec: ModelSpec, ways: int) -> ModelSpec:
    """What one of `ways` chips holds under tensor parallelism: its heads, its part of each feed-forward's width.

    Key heads are replicated where there are fewer than chips; embeddings and norms are whole.

    Raises:
      InputError: heads or widths that `ways` does not divide.
    """

    def part(name: str, size: int) -> int:
        if size % ways:
            raise InputError(f"ways={ways}, but the model's {name}={size} must be a multiple of it.")
        return size // ways

    def ffn(given):
        if isinstance(given, MoESpec):
            shared = None if given.shared is None else ffn(given.shared)
            return dataclasses.replace(given, width=part("experts' width", given.width), shared=shared)
        assert isinstance(given, FFNSpec)
        return dataclasses.replace(given, width=part("width", given.width))

    def layer(given: LayerSpec) -> LayerSpec:
        a = given.attention
        kv_heads = a.kv_heads // ways if a.kv_heads % ways == 0 else 1
        attention = dataclasses.replace(a, heads=part("heads", a.heads), kv_heads=kv_heads)
        return dataclasses.replace(given, attention=attention, ffn=ffn(given.ffn))

    segments = tuple(Segment(tuple(layer(x) for x in s.period), s.repeats) for s in spec.segments)
    return dataclasses.replace(spec, segments=segments)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
