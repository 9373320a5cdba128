"""Values of the small integer operands that steer a kernel, found by running what surrounds it in the jaxpr."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.aot.static.scalars import signed

_MOST_OPERAND = 1 << 20  # elements of an operand that is kept
_MOST_COMPUTED = 1 << 21  # elements that a step of the surroundings may read
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
_LOOPS = ("scan", "while", "cond")


@dataclass(frozen=True)
class Operand:
    """An operand whose values are known: integers of any shape."""

    values: tuple[int, ...]
    shape: tuple[int, ...]
    bits: int


Operands = list[Operand | None]  # of one kernel, in order; None: unknown


def of_kernels(closed: Any, args: Sequence[np.ndarray | None]) -> list[Operands]:
    """For each `pallas_call` outside of loops in a closed jaxpr, what is known of its operands.

    Args:
      args: values of the flat arguments, None where only the shape is known.
    """
    found: list[Operands] = []

    def evaluate(equation: Any, values: list[Any]) -> list[Any] | None:
        if any(v is None for v in values) or sum(np.size(v) for v in values) >= _MOST_COMPUTED:
            return None
        if "pallas" in str(equation.params.get("name", "")):
            return None
        try:
            bound = equation.primitive.get_bind_params(equation.params)
            functions, params = bound if isinstance(bound, tuple) else ((), bound)  # older jax: a pair
            answer = equation.primitive.bind(*functions, *values, **params)
        except Exception:  # a primitive that needs more than values: what it gives stays unknown
            return None
        return list(answer) if equation.primitive.multiple_results else [answer]

    def visit(jaxpr: Any, constants: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        known = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, given, strict=True))

        def value(v: Any) -> Any:
            return v.val if hasattr(v, "val") else known.get(v)

        for equation in jaxpr.eqns:
            values = [value(v) for v in equation.invars]
            results: list[Any] = [None] * len(equation.outvars)
            inner = next((equation.params[k] for k in _INNER if k in equation.params), None)
            if equation.primitive.name == "pallas_call":
                found.append([_operand(v) for v in values])
            elif (answer := evaluate(equation, values)) is not None:
                results = answer
            elif inner is not None and equation.primitive.name not in _LOOPS:
                closed = hasattr(inner, "jaxpr")
                results = visit(inner.jaxpr, inner.consts, values) if closed else visit(inner, (), values)
            known.update(zip(equation.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    visit(closed.jaxpr, closed.consts, args)
    return found


def _operand(value: Any) -> Operand | None:
    if value is None or jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended):
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "iub" or array.size > _MOST_OPERAND:
        return None
    bits = 8 if array.dtype.kind == "b" else 8 * array.dtype.itemsize
    return Operand(tuple(array.ravel().tolist()), array.shape, bits)


def pack(operand: Operand, layout: str = "") -> list[int]:
    """The 32-bit words in which scalar memory holds an operand of an HLO layout such as `{1,0:T(8,128)(2,1)}`."""
    values, shape = operand.values, operand.shape
    found = re.search(r"T\(([\d,]+)\)", layout)
    tile = [int(x) for x in found[1].split(",")] if found else [1, 128]
    per_word = 32 // operand.bits
    if per_word == 1 and (not found or len(shape) < 2 or len(tile) < 2):
        return [signed(v) for v in values]
    columns = shape[-1] if len(shape) > 1 else len(values)
    height = shape[-2] if len(shape) > 1 else 1
    rows = math.prod(shape[:-1]) if len(shape) > 1 else 1
    tile_rows, tile_columns = tile if len(tile) == 2 else (1, tile[0])
    padded, across = -(-height // tile_rows) * tile_rows, -(-columns // tile_columns)
    words: dict[int, int] = defaultdict(int)
    for row in range(rows):
        lead, within = divmod(row, height)
        for column in range(columns):
            value = values[row * columns + column] & ((1 << operand.bits) - 1)
            across_tile, in_tile = divmod(column, tile_columns)
            if len(tile) == 2 or per_word == 1:
                down_tile, down = divmod(within, tile_rows)
                sub, part = divmod(down, per_word)
                size = tile_rows // per_word * tile_columns
                tiles = (lead * padded // tile_rows + down_tile) * across + across_tile
                word = tiles * size + sub * tile_columns + in_tile
            else:
                part, place = divmod(in_tile, tile_columns // per_word)
                word = across_tile * (tile_columns // per_word) + place
            words[word] |= value << (part * operand.bits)
    return [signed(words[k]) for k in range(max(words) + 1)] if words else []
