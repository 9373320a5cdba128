"""The parameters of a model by name, whatever its layout, and how they are filled from tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxinf.checkpoint import packing
from jaxinf.checkpoint.streaming import Progress, Wanted, place_all
from jaxinf.checkpoint.tensors import Pending, Tensors
from jaxinf.models import CausalLM, ModelSpec
from jaxinf.models.causal_lm import Layout
from jaxinf.models.placing import mesh_of, placements, with_arrays
from jaxinf.quant import parts
from pallas_kernels.errors import CheckpointError, UnsupportedError
from sharding import place as place_on_device
from sharding.placement import Index, Read

_CHUNK = 1 << 20
"""Elements converted and checked at a time."""
_TILE = 256


@dataclass(frozen=True)
class Slot:
    """An array of the model, and the names of the parameters in it.

    Names do not depend on the layout: "embed.table", "layers.3.attention.query.kernel", and of a quantised one each
    of its arrays: "layers.3.ffn.up.kernel.scales". An array that stacks the layers of a scan has one name for each
    of its first axis's entries (`stacked`).

    field: which array of a quantised parameter it is; None: the parameter itself.
    """

    path: tuple[Any, ...]
    names: tuple[str, ...]
    stacked: bool
    value: Any
    field: str | None = None

    def of(self, field: str, value: Any) -> Slot:
        """An array of this parameter, quantised."""
        names = tuple(f"{name}.{field}" for name in self.names)
        return Slot((*self.path, field), names, self.stacked, value, field)


Planned = tuple[Slot, Read]
"""An array of the model, and what reads its values at an index to the host."""


def abstract(spec: ModelSpec, dtype, layout: Layout) -> CausalLM:
    """The model with shapes and dtypes for parameters."""
    return nnx.eval_shape(lambda: CausalLM(spec, rngs=nnx.Rngs(0), param_dtype=dtype, layout=layout))


def slots(model: CausalLM) -> list[Slot]:
    """The arrays of a model, abstract or not, in the order of the module tree (that of `placements`)."""
    return [array for slot in parameter_slots(model) for array in arrays_of(slot)]


def parameter_slots(model: CausalLM) -> list[Slot]:
    """The parameters of a model, quantised ones whole."""
    return [_slot(model, path, variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(model))]


def arrays_of(slot: Slot) -> Iterator[Slot]:
    """The arrays of a parameter."""
    for field, value, _ in parts(slot.value, "??"):
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise UnsupportedError(f"{slot.names[0]} is a {type(value).__name__}, which cannot be stored")
        yield slot if field is None else slot.of(field, value)


def _slot(model: CausalLM, path: tuple[Any, ...], value: Any) -> Slot:
    if path[0] != "segments":
        return Slot(path, (".".join(map(str, path)),), False, value)
    _, segment, _, block, *rest = path
    specs = model.spec.segments
    first = sum(s.layers for s in specs[:segment]) + block
    period = len(specs[segment].period)
    stacked = model.layout == "stacked"
    layers = [first + r * period for r in range(specs[segment].repeats)] if stacked else [first]
    tail = ".".join(map(str, rest))
    return Slot(path, tuple(f"layers.{i}.{tail}" for i in layers), stacked, value)


def pending(model: CausalLM) -> Iterator[Pending]:
    """The parameters of a model, ready to be written: as the model knows them, wherever they lie.

    Raises:
      UnsupportedError: parts of them are with other processes.
    """
    mesh = mesh_of(model)
    for slot, placed in zip(slots(model), placements(model, {} if mesh is None else mesh.shape), strict=True):
        if mesh is not None and not slot.value.is_fully_addressable:
            raise UnsupportedError(
                "this process has only a part of the model, so it cannot write it; the checkpoint that it was "
                "loaded from holds all of it"
            )
        shape = placed.own_shape
        for i, name in enumerate(slot.names):

            def value(slot=slot, placed=placed, i=i) -> np.ndarray:
                if mesh is None:
                    whole = np.asarray(slot.value)
                    return whole[i] if slot.stacked else whole
                return placed.fetch(slot.value, i if slot.stacked else None)

            yield packing.stored(Pending(name, placed.dtype, shape[1:] if slot.stacked else shape, value))


def same(x: np.ndarray) -> np.ndarray:
    return x


@dataclass(frozen=True)
class Source:
    """Where a parameter's values lie.

    names: stored tensors; several are stacked along a new first axis.
    view: from one stored tensor to the parameter (or one entry of that axis), of any dtype; moves no data.
    """

    names: tuple[str, ...]
    view: Callable[[np.ndarray], np.ndarray] = same
    several: bool = False


def fill(
    model: CausalLM,
    plan: Sequence[Planned],
    *,
    mesh: Mesh | None = None,
    place: Callable[..., Iterator[jax.Array]] = place_all,
    progress: Progress | None = None,
) -> CausalLM:
    """The abstract `model` with the values that its plan reads, one array at a time.

    Args:
      mesh: spread the model over it; this process reads what its devices hold.
      place: how arrays are placed on the mesh, as `place_all` does.
      progress: called with (bytes on the devices, bytes in all), both of this process.
    """
    if mesh is None:
        values = _on_one_device(plan, progress)
    else:
        placed = placements(model, mesh.shape)
        wanted = [Wanted(p, read, leaf.names, leaf.stacked) for p, (leaf, read) in zip(placed, plan, strict=True)]
        values = place(wanted, mesh, progress)
    return with_arrays(model, {leaf.path: value for (leaf, _), value in zip(plan, values, strict=True)})


def _on_one_device(plan: Sequence[Planned], progress: Progress | None) -> Iterator[jax.Array]:
    total, done = sum(math.prod(leaf.value.shape) * leaf.value.dtype.itemsize for leaf, _ in plan), 0
    for leaf, read in plan:
        value = jax.block_until_ready(place_on_device(read(everything(leaf.value.shape))))
        done += value.nbytes
        if progress is not None:
            progress(done, total)
        yield value


def planned(
    model: CausalLM,
    tensors: Tensors,
    source: Callable[[str], Source],
    *,
    ignorable: Callable[[str], bool],
    at: str,
) -> list[Planned]:
    """The arrays of the abstract `model`, each with what reads its values, or some of them, to the host.

    Args:
      source: from a parameter's name to where its values lie.
      ignorable: whether a stored tensor that no parameter asks for may be left.
      at: what to call the checkpoint in errors.

    Raises:
      CheckpointError: tensors are missing, left over or of another shape (all are named), or a value is NaN
        or infinite.
    """
    leaves = slots(model)
    sources = {name: source(name) for leaf in leaves for name in leaf.names}
    _check_shapes(leaves, sources, tensors, ignorable, at)
    return [(leaf, functools.partial(_gather, leaf, sources, tensors)) for leaf in leaves]


def everything(shape: Sequence[int]) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, n) for n in shape)


@np.errstate(over="ignore", invalid="ignore")  # what overflows is found and named
def _gather(leaf: Slot, sources: dict[str, Source], tensors: Tensors, index: Index) -> np.ndarray:
    """Values of a leaf on the host: a view of the file where that will do, else one new array.

    Of the stored tensors only what lies at `index` is touched, as far as their views move no data.
    """
    dtype = np.dtype(leaf.value.dtype)
    names, inner = (leaf.names[index[0]], index[1:]) if leaf.stacked else (leaf.names, index)
    if not leaf.stacked and not sources[names[0]].several:
        stored = sources[names[0]].names[0]
        view = _view(sources[names[0]], tensors, stored, inner)
        if view.dtype == dtype and view.flags.c_contiguous:
            _check_finite(view, stored)
            return view
        out = _aligned(view.shape, dtype)
        _copy(out, view, stored)
        return out
    out = _aligned(tuple(s.stop - s.start for s in index), dtype)
    for i, name in enumerate(names):
        target, source = (out[i] if leaf.stacked else out), sources[name]
        stored, part = (source.names[inner[0]], inner[1:]) if source.several else (source.names, inner)
        for j, one in enumerate(stored):
            values = _view(source, tensors, one, part)
            _copy(target[j] if source.several else target, values, one)
    return out


def _view(source: Source, tensors: Tensors, name: str, index: Index) -> np.ndarray:
    """Of a stored tensor, what lies at an index of its view."""
    if source.view is same:
        return tensors.part(name, index)
    values = source.view(tensors.read(name))[index]
    tensors.expect(name, values)
    return values


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, values: np.ndarray, name: str) -> None:
    if target.ndim > 2:
        for t, v in zip(target, values, strict=True):
            _copy(t, v, name)
    elif target.ndim == 2 and values.strides[0] < values.strides[1]:
        # Transposed: tile by tile, so that neither side strides through memory.
        for i in range(0, target.shape[0], _TILE):
            for j in range(0, target.shape[1], _TILE):
                target[i : i + _TILE, j : j + _TILE] = values[i : i + _TILE, j : j + _TILE]
            _check_finite(target[i : i + _TILE], name)
    else:
        rows = max(1, _CHUNK // max(1, target[:1].size))
        for i in range(0, target.shape[0], rows):
            target[i : i + rows] = values[i : i + rows]
            _check_finite(target[i : i + rows], name)


def _check_finite(x: np.ndarray, name: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return
    if x.size > _CHUNK and x.ndim > 1:
        rows = max(1, _CHUNK // max(1, x[:1].size))
        for i in range(0, x.shape[0], rows):
            if x.shape[0] > 1:
                _check_finite(x[i : i + rows], name)
            else:
                _check_finite(x[0], name)
        return
    if x.dtype.itemsize == 2 and x.dtype.kind in "fV":
        # The exponent's bits all set: many times faster than the test by value.
        bits = np.uint16(0x7F80 if x.dtype == jnp.bfloat16 else 0x7C00)
        good = not np.any((x.view(np.uint16) & bits) == bits)
    else:
        good = bool(np.all(np.isfinite(x)))
    if not good:
        raise CheckpointError(
            f"tensor {name} holds values that are NaN or infinite in {x.dtype}; the checkpoint is damaged, or "
            "needs a wider dtype"
        )


def _check_shapes(
    leaves: Sequence[Slot],
    sources: dict[str, Source],
    tensors: Tensors,
    ignorable: Callable[[str], bool],
    at: str,
) -> None:
    used = {stored for source in sources.values() for stored in source.names}
    missing = sorted(used - set(tensors))
    extra = sorted(name for name in tensors if name not in used and not ignorable(name))
    wrong = []
    for leaf in leaves:
        want = tuple(leaf.value.shape)[1:] if leaf.stacked else tuple(leaf.value.shape)
        for name in leaf.names:
            source = sources[name]
            for stored in source.names:
                if stored in tensors and (why := _mismatch(tensors, stored, source, want, leaf)):
                    wrong.append(why)
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("not understood", extra), ("of another shape or kind", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"the tensors of {at} do not fit its config; " + "; ".join(problems))


def _mismatch(tensors: Tensors, stored: str, source: Source, want: tuple[int, ...], leaf: Slot) -> str | None:
    want = want[1:] if source.several else want
    shape, dtype = tensors[stored].shape, tensors[stored].dtype
    if leaf.field is None and (dtype.itemsize == 1 or not jnp.issubdtype(dtype, jnp.floating)):
        return f"{stored} in {dtype}, which is no form of plain weights"
    if leaf.field is not None and dtype != leaf.value.dtype:
        return f"{stored} in {dtype}, where that of other layers is in {leaf.value.dtype}"
    got = viewed_shape(source, shape)
    if got == want:
        return None
    return f"{stored} {list(shape)}, where the parameter is {list(want)}"


def viewed_shape(source: Source, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that a stored tensor of this shape is seen in; None: it cannot be."""
    try:
        return source.view(np.broadcast_to(np.int8(0), shape)).shape
    except (ValueError, IndexError):
        return None
