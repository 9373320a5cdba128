"""The small integer operands that steer kernels, as scalar memory holds them."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.aot.static import values
from jaxinf.aot.static.scalars import signed

_MOST_OPERAND = 1 << 20  # elements of an operand that is kept


@dataclass(frozen=True)
class Operand:
    """An operand whose values are known: integers of any shape."""

    values: tuple[int, ...]
    shape: tuple[int, ...]
    bits: int


Operands = list[Operand | None]  # of one kernel, in order; None: unknown


@dataclass(frozen=True)
class Kernel:
    """A kernel's call, and what is known of its operands.

    Attributes:
      shapes: of its operands, such as "s32[8]".
    """

    name: str
    shapes: tuple[str, ...]
    operands: Operands


def of_kernels(closed: Any, args: Sequence[np.ndarray | None]) -> list[Kernel]:
    """For each `pallas_call` in a closed jaxpr, what is known of its operands.

    Args:
      args: values of the flat arguments, None where only the shape is known.
    """
    return [Kernel(k.name, k.shapes, [_operand(v) for v in k.values]) for k in values.kernels(closed, args)]


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
