"""The speculative loop of a pair of models as a program for chips that are not here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinf.aot import lowering, programs, topology
from jaxinf.core import from_record
from jaxinf.generation import speculative
from jaxinf.generation.loop import State
from jaxinf.generation.sampling import Controls
from jaxinf.generation.speculative import Costs, DraftModel, Policy, Speculation, Tally
from jaxinf.models import ModelSpec, presets
from jaxinf.models.causal_lm import init_cache
from pallas_kernels.named import Call, Work
from sharding import meshes, program
from sharding.collectives import AXES
from sharding.program import OWN, ROWS, SAME
from sharding.rules import RULES


@dataclass(frozen=True)
class Pair:
    """A loop that is not compiled yet, and bytes on each device of what it keeps: of the target and of the
    draft."""

    call: Call
    mesh: Mesh
    weights: tuple[int, int]
    cache: tuple[int, int]


def speculation(
    target: str | ModelSpec,
    draft: str | ModelSpec,
    *,
    chip: str,
    mesh: str | Mapping[str, int],
    draft_tokens: int = 4,
    batch: int = 1,
    capacity: int = 2048,
    passes: int = 32,
    dtype: Any = "bfloat16",
    quantize: str | None = None,
    quantize_draft: str | None = None,
    adaptive: bool = True,
    temperature: bool = False,
) -> Pair:
    """The loop of `jaxinf.generation.speculative` with a draft model, both models on one mesh.

    Args:
      target, draft: presets' names or specs of one vocabulary. chip: or slice. mesh: axes and sizes over it.
      draft_tokens: of a draft. passes: of a call. capacity: tokens of a row.
      quantize, quantize_draft: of linear weights, such as "int8".
      adaptive: with the choice of how much to draft. temperature: rows are sampled, by rejection.

    Raises:
      InputError: no such preset or chip; sizes that a model cannot be cut by.
    """
    specs = [presets.preset(x) if isinstance(x, str) else x for x in (target, draft)]
    sizes = meshes.parse(mesh) if isinstance(mesh, str) else {a: mesh.get(a, 1) for a in AXES}
    where = topology.mesh(chip, tuple(sizes.values()), AXES)
    ways = math.prod(sizes[axis] for axis in RULES["batch"])
    rows = batch + -batch % ways
    large, small = (
        programs.placed_on(where, spec, dtype, scheme)
        for spec, scheme in zip(specs, (quantize, quantize_draft), strict=True)
    )

    def drafter(weights) -> DraftModel:
        return DraftModel(small.rebuilt(weights), tokens=draft_tokens)

    def caches(large_weights, small_weights):
        own, append = rows // ways, draft_tokens + 1
        kept = init_cache(specs[0], own, capacity, dtype=jnp.dtype(dtype), layout="stacked", max_append=append)
        return kept, drafter(small_weights).init(large.rebuilt(large_weights), own, capacity)

    def run(large_weights, small_weights, state, steps, eos, controls, costs):
        state, written = speculative.decode(
            large.rebuilt(large_weights),
            drafter(small_weights),
            state,
            steps=steps,
            eos=eos,
            controls=controls,
            costs=costs,
            width=passes * (draft_tokens + 1),
        )
        return state, program.gather_rows((written.tokens, written.counts))

    def row(dtype: Any, *more: int) -> Any:
        return programs.lying(jax.ShapeDtypeStruct((rows, *more), dtype), where, ROWS)

    def scalar(dtype: Any) -> Any:
        return programs.lying(jax.ShapeDtypeStruct((), dtype), where, SAME)

    with lowering.use(where):
        made = program.over(where, caches, (large.split, small.split), OWN)
        shapes = jax.eval_shape(made, large.weights, small.weights)
        kept, drafts = jax.tree.map(lambda x: programs.lying(x, where, OWN), shapes)
    whole, part = jnp.int32, jnp.float32
    rest: Any = dict(tokens=row(whole), emitted=row(whole), limits=row(whole), seeds=row(jnp.uint32))
    held = State(kept, finished=row(jnp.bool_), vocab=specs[0].vocab, **rest)
    policy = Policy(
        row(part), row(part), row(part), scalar(whole), scalar(whole), draft_tokens, chain=True, steps=True
    )
    tally = Tally(row(whole), row(whole), row(whole, draft_tokens), row(whole, draft_tokens))
    state = Speculation(held, drafts, row(whole, capacity), policy, tally)
    controls = Controls(temperature=row(part) if temperature else None)
    costs = Costs(scalar(part), scalar(part), scalar(part)) if adaptive else None
    eos = programs.lying(jax.ShapeDtypeStruct((4,), whole), where, SAME)
    arguments = (large.weights, small.weights, state, scalar(whole), eos, controls, costs)
    takes = jax.tree.map(lambda x: x.sharding.spec, arguments)
    call = Call(program.over(where, run, takes, (takes[2], SAME)), arguments, Work(0.0, 0.0), donate=(2,))
    weights = programs.nbytes(large.weights), programs.nbytes(small.weights)
    return Pair(call, where, weights, (programs.nbytes(kept), programs.nbytes(drafts)))


def loop(target: Any, draft: Any, **arguments: Any) -> Call:
    """`speculation` by JSON arguments, for the compiler's process."""
    return speculation(from_record(ModelSpec, target), from_record(ModelSpec, draft), **arguments).call
