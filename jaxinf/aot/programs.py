"""Whole programs of a model, to be compiled for chips that are not here: prefill, a decode step, or both in one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinf import compression
from jaxinf.aot import lowering, topology
from jaxinf.aot.job import Steered
from jaxinf.cache import Kind
from jaxinf.checkpoint.parameters import abstract
from jaxinf.generation import loop
from jaxinf.generation.step import decode_step, prefill
from jaxinf.models import ModelSpec, presets
from jaxinf.models.causal_lm import init_cache
from jaxinf.models.placing import place_abstract
from pallas_kernels.errors import InputError
from pallas_kernels.named import Call, Work
from pallas_kernels.vmem import bits
from sharding import meshes, program, split_axis
from sharding.collectives import AXES
from sharding.program import OWN, ROWS, SAME
from sharding.rules import RULES

Part = Literal["generate", "prefill", "append", "verify", "decode"]

_PASS = 1024
"""Tokens: four times what makes a product of bfloat16 weights bound by arithmetic on a v5e (197e12 / 819e9)."""


@dataclass(frozen=True)
class Generation:
    """A compiled program of a model, and what it keeps.

    Attributes:
      weights, cache: bytes on each device.
      part: as in `built`.
    """

    compiled: lowering.Compiled
    weights: int
    cache: int
    part: Part = "generate"

    @property
    def temporaries(self) -> float:
        """Bytes of temporaries over those of the cache: near 0 where the cache is never copied."""
        return self.compiled.memory.temporaries / self.cache


def generation(
    model: str | ModelSpec,
    *,
    chip: str = "v5e",
    mesh: str | Mapping[str, int] | None = None,
    part: Part = "generate",
    batch: int = 8,
    prompt: int = 1024,
    new_tokens: int = 128,
    capacity: int | None = None,
    piece: int | None = None,
    dtype: Any = "bfloat16",
    quantize: str | None = None,
    cache: Kind | None = None,
) -> Generation:
    """Compiles a program of a model for a slice: see `built`.

    Raises:
      TooLarge: it does not fit the chip.
      InputError: no such preset or chip; sizes that the model cannot be cut by.
    """
    made = built(
        model,
        chip=chip,
        mesh=mesh,
        part=part,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        capacity=capacity,
        piece=piece,
        dtype=dtype,
        quantize=quantize,
        cache=cache,
    )
    compiled = lowering.lower(made.call.fn, *made.call.args, chip=chip, mesh=made.mesh, donate=made.call.donate)
    return Generation(compiled, made.weights, made.cache, part)


@dataclass(frozen=True)
class Built:
    """A program that is not compiled yet, and bytes on each device of what it keeps."""

    call: Call
    mesh: Mesh
    weights: int
    cache: int


def built(
    model: str | ModelSpec,
    *,
    chip: str = "v5e",
    mesh: str | Mapping[str, int] | None = None,
    part: Part = "generate",
    batch: int = 8,
    prompt: int = 1024,
    new_tokens: int = 128,
    capacity: int | None = None,
    piece: int | None = None,
    dtype: Any = "bfloat16",
    quantize: str | None = None,
    cache: Kind | None = None,
    held: int | None = None,
) -> Built:
    """A program of a model for a slice: `jaxinf.generation.loop.generate`, or a part of it.

    Args:
      model: a preset's name or a spec.
      chip: or slice, such as "v5e:4x4".
      mesh: axes and sizes over the slice's devices, such as "tensor=8"; None: one device.
      part: "generate": ragged prompts in pieces, then the decode loop, in one program. "prefill": one pass over
        prompts. "append": one after `held` tokens. "verify": the same of few tokens, with the choice of what comes
        after each. "decode": one token a row, and the choice of the next.
      batch, prompt: rows, and tokens of the longest prompt. Rows are padded to what the mesh divides.
      capacity: tokens a row that the cache has room for; default: prompt + new_tokens.
      piece: tokens of a prompt that one pass takes; activations grow with it. None: so many that a chip's rows have
        a thousand in a pass together, which keeps its matrix units busy.
      dtype: of weights and cache. quantize: of linear weights, such as "int8" (`jaxinf.compression.quantize`).
      cache: "int8", "fp8" or "int4": keys and values in fewer bits.
      held: tokens that each row's cache has; None: not known. The static model follows kernels by it.

    Raises:
      InputError: no such preset or chip; sizes that the model cannot be cut by.
    """
    spec = presets.preset(model) if isinstance(model, str) else model
    dtype = jnp.dtype(dtype)
    capacity = prompt + new_tokens if capacity is None else capacity
    sizes = meshes.parse(mesh or "") if not isinstance(mesh, Mapping) else {a: mesh.get(a, 1) for a in AXES}
    where = topology.mesh(chip, tuple(sizes.values()), AXES)
    ways_of_rows = math.prod(sizes[axis] for axis in RULES["batch"])
    rows = batch + -batch % ways_of_rows
    if piece is None:
        piece = piece_of(rows // ways_of_rows)

    placed = placed_on(where, spec, dtype, quantize)
    weights, rebuilt = placed.weights, placed.rebuilt
    with lowering.use(where):

        def empty():
            options: Any = dict(dtype=dtype, layout="stacked", kind=cache)
            return init_cache(
                spec, rows // ways_of_rows, capacity, max_append=prompt if part == "verify" else 1, **options
            )

        stored = jax.eval_shape(program.over(where, empty, (), OWN))

    def whole(weights, tokens, counts, cache):
        model = rebuilt(weights)
        state, written = loop.generate(model, tokens, counts, cache, max_new_tokens=new_tokens, piece=piece)
        return state.cache, program.gather_rows((written.tokens, written.counts))

    def read(weights, tokens, counts, cache):
        logits, cache = prefill(rebuilt(weights), tokens, counts, cache, fresh=part == "prefill")
        return cache, program.gather_rows(split_axis.argmax(logits))

    def step(weights, tokens, counts, cache):
        logits, cache = decode_step(rebuilt(weights), tokens, cache, counts=counts)
        return cache, program.gather_rows(split_axis.argmax(logits))

    def verify(weights, tokens, counts, cache):
        model = rebuilt(weights)
        hidden, cache, _ = model.hidden(tokens, cache, counts=counts)
        return cache, program.gather_rows(split_axis.argmax(model.logits(hidden)))

    functions: dict[str, Callable] = dict(generate=whole, prefill=read, append=read, verify=verify, decode=step)
    if part not in functions:
        raise InputError(f"part={part!r} must be one of {', '.join(functions)}")
    run = program.over(where, functions[part], (placed.split, ROWS, ROWS, OWN), (OWN, SAME))

    def lies(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return lying(x, where, spec)

    def steered(x: jax.ShapeDtypeStruct, value: int | None) -> Any:
        return x if value is None else Steered(np.full(x.shape, value, x.dtype), x.sharding)

    shape = (rows,) if part == "decode" else (rows, prompt)
    tokens = lies(jax.ShapeDtypeStruct(shape, jnp.int32), ROWS)
    new = None if held is None else 1 if part == "decode" else prompt
    counts = steered(lies(jax.ShapeDtypeStruct((rows,), jnp.int32), ROWS), new)
    stored = jax.tree.map(lambda c: lies(c, OWN), stored)  # as the device lays it out
    size = nbytes(stored)
    stored = dataclasses.replace(stored, lengths=steered(stored.lengths, held))
    call = Call(run, (weights, tokens, counts, stored), Work(0.0, 0.0), donate=(3,))
    return Built(call, where, nbytes(weights), size)


@dataclass(frozen=True)
class Placed:
    """A model's weights on a described mesh, flat, and the module again from them. split: how they are cut."""

    weights: list[jax.ShapeDtypeStruct]
    rebuilt: Callable[[Any], Any]
    split: list[PartitionSpec]


def placed_on(where: Mesh, spec: ModelSpec, dtype: Any, quantize: str | None) -> Placed:
    """A model without values, spread over a mesh.

    Raises:
      InputError: the mesh does not divide it.
    """
    with lowering.use(where):
        made = abstract(spec, jnp.dtype(dtype), "stacked")
        if quantize is not None:
            made = compression.quantize(made, quantize)
        graph, state = nnx.split(place_abstract(made, where))
    weights, tree = jax.tree.flatten(state)
    split = [w.sharding.spec for w in weights]
    return Placed(weights, lambda given: nnx.merge(graph, jax.tree.unflatten(tree, given)), split)


def lying(x: Any, where: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, spread over a mesh."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(where, spec))


def piece_of(rows: int) -> int:
    """Tokens of a prompt that one pass takes, with so many rows on a chip: a power of 2."""
    return min(loop.PIECE, max(16, 1 << max(1, _PASS // rows).bit_length() - 1))


def nbytes(tree: Any) -> int:
    """On each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * bits(x.dtype.name) // 8 for x in jax.tree.leaves(tree))
