"""Values of the small integers that steer kernels, found by running what surrounds the kernels in the jaxpr.

Loops are followed through their first trip, branches where the predicate is known. Inside a `shard_map` the program
is the first chip's, and all chips are taken to hold the same: a sum is so many times its value. Where a mixture
chooses experts by scores that nobody knows, tokens are taken to go to all experts in turn, with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST_COMPUTED = 1 << 21  # elements that a step of the surroundings may read
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")


@dataclass(frozen=True)
class KernelCall:
    """A `pallas_call`.

    Attributes:
      shapes: of its operands, as HLO writes them without layouts, such as "s32[8]".
      values: of its operands; None: unknown.
    """

    name: str
    shapes: tuple[str, ...]
    values: tuple[Any, ...]


def kernels(closed: Any, args: Sequence[np.ndarray | None]) -> list[KernelCall]:
    """Every `pallas_call` of a closed jaxpr, each once, in program order.

    Args:
      args: values of the flat arguments, None where only the shape is known.
    """
    run = _Run()
    run.visit(closed.jaxpr, closed.consts, args)
    return run.found


class _Run:
    def __init__(self) -> None:
        self.found: list[KernelCall] = []
        self._axes: Mapping[str, int] = {}

    def visit(self, jaxpr: Any, constants: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        known = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, given, strict=True))

        def value(v: Any) -> Any:
            return v.val if hasattr(v, "val") else known.get(v)

        for equation in jaxpr.eqns:
            values = [value(v) for v in equation.invars]
            results = self._equation(equation, values) or [None] * len(equation.outvars)
            known.update(zip(equation.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, values: list[Any]) -> list[Any] | None:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            self._kernel(equation, values)
            return None
        special: Callable[..., list[Any] | None] | None = getattr(self, f"_do_{name}", None)
        if special is not None:
            return special(equation, values)
        if name in _COLLECTIVES and self._axes:
            return self._collective(equation, values)
        inner = next((params[k] for k in _INNER if k in params), None)
        if inner is None:
            return _evaluate(equation, values)
        answer = _evaluate(equation, values) if "pallas" not in str(params.get("name", "")) else None
        if answer is not None:
            return answer
        closed = hasattr(inner, "jaxpr")
        return self.visit(inner.jaxpr, inner.consts, values) if closed else self.visit(inner, (), values)

    def _kernel(self, equation: Any, values: list[Any]) -> None:
        named = equation.params.get("name_and_src_info")
        name = getattr(named, "name", None) or str(equation.params.get("name", ""))
        shapes = tuple(_shape(v.aval) for v in equation.invars)
        self.found.append(KernelCall(name, shapes, tuple(values)))

    def _do_platform_index(self, equation: Any, values: list[Any]) -> list[Any]:
        platforms = equation.params["platforms"]
        at = next((i for i, names in enumerate(platforms) if names is not None and "tpu" in names), None)
        return [np.int32(len(platforms) - 1 if at is None else at)]

    def _do_cond(self, equation: Any, values: list[Any]) -> list[Any] | None:
        branches = equation.params["branches"]
        chosen, rest = values[0], values[1:]
        if chosen is not None:
            branch = branches[int(np.clip(int(chosen), 0, len(branches) - 1))]
            return self.visit(branch.jaxpr, branch.consts, rest)
        for branch in branches:
            self.visit(branch.jaxpr, branch.consts, rest)
        return None

    def _do_scan(self, equation: Any, values: list[Any]) -> list[Any]:
        params, body = equation.params, equation.params["jaxpr"]
        constants, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
        first = -1 if params.get("reverse") else 0
        slices = [None if x is None or len(x) == 0 else x[first] for x in values[carried:]]
        after = self.visit(body.jaxpr, body.consts, [*values[:carried], *slices])
        return self._after(values[constants:carried], after, len(equation.outvars))

    def _do_while(self, equation: Any, values: list[Any]) -> list[Any]:
        params, body = equation.params, equation.params["body_jaxpr"]
        start = params["cond_nconsts"]
        carried = start + params["body_nconsts"]
        after = self.visit(body.jaxpr, body.consts, [*values[start:carried], *values[carried:]])
        return self._after(values[carried:], after, len(equation.outvars))

    def _after(self, before: list[Any], after: list[Any], count: int) -> list[Any]:
        """What a loop leaves: known where a trip does not change it."""
        kept = [a if _same(a, b) else None for a, b in zip(before, after, strict=False)]
        return kept + [None] * (count - len(kept))

    def _do_shard_map(self, equation: Any, values: list[Any]) -> None:
        params, outside = equation.params, self._axes
        sizes = dict(params["mesh"].shape)
        parts = [
            None if v is None else _part(np.asarray(v), spec, sizes)
            for v, spec in zip(values, params["in_specs"], strict=True)
        ]
        self._axes = {**outside, **sizes}
        body = params["jaxpr"]
        closed = hasattr(body, "jaxpr")
        self.visit(body.jaxpr if closed else body, body.consts if closed else (), parts)
        self._axes = outside

    def _do_top_k(self, equation: Any, values: list[Any]) -> list[Any] | None:
        if values[0] is not None:
            return _evaluate(equation, values)
        best, among = equation.outvars[0].aval, equation.invars[0].aval.shape[-1]
        alike = np.full(best.shape, 1 / best.shape[-1], best.dtype)
        return [alike, (np.arange(math.prod(best.shape), dtype=np.int32) % among).reshape(best.shape)]

    def _do_sort(self, equation: Any, values: list[Any]) -> list[Any] | None:
        """Known keys order what is known beside them, whatever travels along."""
        keys, axis = values[: equation.params["num_keys"]], equation.params["dimension"]
        if any(key is None for key in keys):
            return None
        order = np.lexsort([np.moveaxis(np.asarray(key), axis, -1) for key in reversed(keys)], axis=-1)
        order = np.moveaxis(order, -1, axis)
        return [None if v is None else np.take_along_axis(np.asarray(v), order, axis) for v in values]

    def _collective(self, equation: Any, values: list[Any]) -> list[Any] | None:
        name, params = equation.primitive.name, equation.params
        if name == "axis_index":
            return [np.int32(0)]
        if values[0] is None and len(values) == 1:
            return None
        axes = params.get("axes", params.get("axis_name"))
        names = axes if isinstance(axes, tuple) else (axes,)
        chips = math.prod(self._axes.get(a, 1) for a in names)
        return [None if v is None else _told(name, np.asarray(v), chips, params) for v in values]


_COLLECTIVES = ("axis_index", "psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all", "ppermute")


def _told(name: str, x: np.ndarray, chips: int, params: Mapping[str, Any]) -> np.ndarray | None:
    """What a collective gives where all chips hold the same."""
    if name in ("psum", "psum_invariant"):
        return (x * chips).astype(x.dtype)
    if name == "all_gather":
        at = params["all_gather_dimension"]
        return np.concatenate([x] * chips, at) if params["tiled"] else np.stack([x] * chips, at)
    if name == "all_to_all":
        if not params.get("tiled"):
            return None
        piece = np.split(x, chips, params["split_axis"])[0]
        return np.concatenate([piece] * chips, params["concat_axis"])
    return x


def _part(x: np.ndarray, spec: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """The first chip's part."""
    for dim, axes in enumerate(spec):
        names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        ways = math.prod(sizes[name] for name in names)
        if ways > 1:
            x = np.split(x, ways, dim)[0]
    return x


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return False
    return a is b or (np.shape(a) == np.shape(b) and bool(np.array_equal(np.asarray(a), np.asarray(b))))


def _evaluate(equation: Any, values: list[Any]) -> list[Any] | None:
    if any(v is None for v in values) or sum(np.size(v) for v in values) >= _MOST_COMPUTED:
        return None
    if sum(math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")) >= _MOST_COMPUTED:
        return None
    try:
        bound = equation.primitive.get_bind_params(equation.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)  # older jax: a pair
        answer = equation.primitive.bind(*functions, *values, **params)
    except Exception:  # a primitive that needs more than values: what it gives stays unknown
        return None
    return list(answer) if equation.primitive.multiple_results else [answer]


def _shape(aval: Any) -> str:
    """As HLO writes it."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return ""
    kinds = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "bool": "pred"}
    name = str(np.dtype(dtype))
    short = kinds.get(name) or name.replace("uint", "u").replace("int", "s")
    return f"{short}[{','.join(map(str, aval.shape))}]"
