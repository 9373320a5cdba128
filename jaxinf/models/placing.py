"""How a model's parameters lie on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinf.layers import LayerSpec, MoESpec
from jaxinf.models.causal_lm import CausalLM, Layout
from jaxinf.models.pipeline import in_stages
from jaxinf.models.spec import ModelSpec
from jaxinf.quant import parts
from pallas_kernels.errors import InputError, UnsupportedError
from sharding import meshes, rules
from sharding.collectives import AXES
from sharding.placement import Dim, Placed, padded, repeated

_MOST = 4096
"""No axis of a mesh is longer."""


def check(spec: ModelSpec, sizes: Mapping[str, int], layout: Layout = "stacked") -> None:
    """Whether a mesh of these sizes divides a model.

    The vocabulary is padded and key heads are repeated where they are too few; all else must divide.

    Raises:
      InputError: it does not; the message names the dimensions, their sizes, and the axis sizes that would do.
    """
    for axis in AXES:
        ways = sizes.get(axis, 1)
        if ways == 1:
            continue
        wrong = list(dict.fromkeys(what for what, fits in _needs(spec, axis) if not fits(ways)))
        if wrong:
            fine = [n for n in range(1, _MOST + 1) if _divides(spec, axis, n)]
            some = ", ".join(map(str, fine[:12])) + (", ..." if len(fine) > 12 else "")
            raise InputError(f"{axis}={ways} does not divide the model's {', '.join(wrong)}; {axis} may be {some}")
    if sizes.get("pipeline", 1) > 1 and layout != "stacked":
        raise InputError(f'pipeline={sizes["pipeline"]} cuts stacks of layers, so it needs layout="stacked"')


def mesh_for(spec: ModelSpec, mesh: str | Mapping[str, int] | Mesh) -> Mesh:
    """The mesh that a user means for a model: as `sharding.meshes.make`, or "auto" (see `auto`)."""
    return meshes.make(auto(spec, jax.device_count()) if isinstance(mesh, str) and mesh == "auto" else mesh)


def auto(spec: ModelSpec, devices: int) -> dict[str, int]:
    """Sizes of a mesh of all devices that divides a model: as much `tensor` as it takes, the rest `data`.

    That is the least memory a chip without stages of layers. `jaxinf plan` compares meshes by time.
    """
    fits = [n for n in range(1, devices + 1) if devices % n == 0 and _divides(spec, "tensor", n)]
    return {"data": devices // max(fits), "tensor": max(fits)}


def _divides(spec: ModelSpec, axis: str, ways: int) -> bool:
    return all(fits(ways) for _, fits in _needs(spec, axis))


def placements(model: CausalLM, sizes: Mapping[str, int]) -> list[Placed]:
    """How each parameter of a model, abstract or not, lies on a mesh of these sizes, in the order of its state.

    Raises:
      InputError: as `check`.
    """
    check(model.spec, sizes, model.layout)
    flat = nnx.to_flat_state(nnx.state(model))
    return [placed for path, variable in flat for placed in _placed(model, sizes, path, variable)]


def place_model(model: CausalLM, mesh: Mesh) -> CausalLM:
    """The model with its parameters spread over a mesh; one that lies on another mesh is moved.

    Args:
      mesh: with all of `sharding.AXES`. With several processes, each has the same model.

    Raises:
      InputError: as `check`.
    """
    before = mesh_of(model)
    now = placements(model, {} if before is None else before.shape)
    then = placements(model, mesh.shape)
    values = _arrays(model)
    moved = {}
    for value, old, new in zip(values, now, then, strict=True):
        moved[new.path] = new.place(value if before is None else old.fetch(value), mesh)
    return with_arrays(model, moved)


def place_abstract(model: CausalLM, mesh: Mesh) -> CausalLM:
    """The model with `jax.ShapeDtypeStruct`s for parameters, as they lie on a mesh of real or described devices.

    Raises:
      InputError: as `check`.
    """
    return with_arrays(model, {placed.path: placed.abstract(mesh) for placed in placements(model, mesh.shape)})


def unplace(model: CausalLM) -> CausalLM:
    """The model with its parameters whole on the host, as numpy arrays, nothing padded or repeated.

    Raises:
      UnsupportedError: parts of it are with other processes.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return model
    whole = {}
    for placed, value in zip(placements(model, mesh.shape), _arrays(model), strict=True):
        if not value.is_fully_addressable:
            raise UnsupportedError("this process has only a part of the model; gather it where all parts are")
        whole[placed.path] = placed.fetch(value)
    return with_arrays(model, whole)


def mesh_of(model: CausalLM) -> Mesh | None:
    """The mesh that `place_model` spread the model over, or None."""
    for value in _arrays(model):
        where = getattr(value, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh.axis_names == AXES:
            assert isinstance(where.mesh, Mesh)
            return where.mesh
    return None


def _arrays(model: CausalLM) -> list[Any]:
    """In the order of `placements`."""
    return jax.tree.leaves([variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(model))])


def with_arrays(model: CausalLM, values: Mapping[tuple[Any, ...], Any]) -> CausalLM:
    """The model with other arrays, by the paths that `placements` gives them."""
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        new = [values[path if name is None else (*path, name)] for name, *_ in parts(variable.get_value(), "??")]
        flat.append((path, variable.replace(jax.tree.unflatten(jax.tree.structure(variable.get_value()), new))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _placed(model: CausalLM, sizes: Mapping[str, int], path: tuple[Any, ...], variable: Any) -> Iterator[Placed]:
    logical = variable.get_metadata().get("logical_axes")
    at = ".".join(map(str, path))
    assert logical is not None, f"{at} has no logical axes"
    attention, whole = None, False
    if path[0] == "segments":
        segment = model.spec.segments[int(path[1])]
        attention = segment.period[int(path[3]) % len(segment.period)].attention
        if model.layout == "stacked":
            logical = ("layers", *logical)
            whole = not in_stages(model.spec, int(path[1]))
    whole_value = variable.get_value()
    for field, value, names in parts(whole_value, logical):
        inner = logical[-2] if field == "order" else None
        if inner is not None and math.prod(sizes.get(axis, 1) for axis in rules.RULES[inner]) > 1:
            raise UnsupportedError(
                f"the rows of {at} lie in an order of their own (GPTQ with desc_act), so a mesh cannot split its "
                f"{inner} channels; take a mesh with tensor=1, or a checkpoint without desc_act"
            )
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise UnsupportedError(f"{at} is a {type(value).__name__}, which cannot be placed")
        dims = []
        for i, (size, name) in enumerate(zip(value.shape, names, strict=True)):
            if name == "vocab":
                dims.append(padded(model.spec.vocab, sizes.get("tensor", 1)))
            elif name == "kv_heads":
                assert attention is not None
                # Heads and their channels are one dimension, or two.
                own = attention.kv_heads * (attention.head_dim if i == len(names) - 1 else 1)
                dims.append(repeated(own, attention.kv_heads, sizes.get("tensor", 1)))
            elif name is not None and name.startswith(rules.GROUPS):
                ways = math.prod(sizes.get(axis, 1) for axis in rules.RULES[name.removeprefix(rules.GROUPS)])
                dims.append(_groups(size, whole_value.shape[-2], ways))
            else:
                dims.append(Dim(size))
        partition = rules.spec(names)
        if whole:
            partition = PartitionSpec(None, *partition[1:])
        yield Placed(path if field is None else (*path, field), np.dtype(value.dtype), tuple(dims), partition)


def _groups(groups: int, inner: int, ways: int) -> Dim:
    """Groups of `inner` rows that `ways` chips split: as many and as small as lie whole on one chip each."""
    group = inner // groups
    return Dim(groups, times=group // math.gcd(group, inner // ways))


Need = tuple[str, Callable[[int], bool]]
"""What must be divided, such as "heads=4", and whether so many chips do."""


def _needs(spec: ModelSpec, axis: str) -> Iterator[Need]:
    if axis == "pipeline":
        for i, segment in enumerate(spec.segments):
            if in_stages(spec, i):
                of = f" (of {len(segment.period)} layers)" if len(segment.period) > 1 else " (layers)"
                yield _multiple("repeats", segment.repeats, of)
    elif axis in ("tensor", "expert"):
        for layer in dict.fromkeys(spec.layers()):
            yield from _layer_needs(layer, axis)


def _layer_needs(layer: LayerSpec, axis: str) -> Iterator[Need]:
    a, ffn = layer.attention, layer.ffn
    if axis == "expert":
        if isinstance(ffn, MoESpec):
            yield _multiple("experts", ffn.experts)
        return
    yield _multiple("heads", a.heads)
    kv = a.kv_heads
    yield f"kv_heads={kv}", lambda ways: kv % ways == 0 or ways % kv == 0
    for part in (ffn, ffn.shared) if isinstance(ffn, MoESpec) else (ffn,):
        if part is not None:
            yield _multiple("expert_ffn" if isinstance(part, MoESpec) else "ffn", part.width)


def _multiple(name: str, size: int, note: str = "") -> Need:
    return f"{name}={size}{note}", lambda ways: size % ways == 0
