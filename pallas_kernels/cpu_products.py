"""Products of a few rows with a stored weight, in the form that XLA's CPU compiler keeps in one fused loop.

What that compiler does on its own (jaxlib 0.10, x86-64 with AVX-512, two cores) and what this file does about
it; the ratios are of processor time to that of a float32 dot of one row with a 576x1536 weight:

- A dot needs its operands as whole arrays, and a widened weight does not depend on the activations, so a
  program widens all its weights first and keeps them all: x11 from bfloat16 or int8, most of it page faults.
- A float32 dot of one row streams its weight at the speed of memory. One of two to eight rows goes to a
  library that repacks the weight at each call: x2.0 to x2.4; the native bfloat16 dot of that library, x1.3 to
  x1.6 (one row of bfloat16 is widened instead).
- A plain sum of products goes to the same library's reduction: x1.0 to x1.4 from any dtype. A reduction with
  two results or more does not: it becomes one loop that widens, multiplies and adds in registers and is split
  over the threads. Inside, only a loop short enough to be unrolled leaves the next one to be vectorised. So the
  products are summed over short runs, with two independent sums at a time, and the partial sums (small, in
  cache) are added up by a dot with ones: x0.5 from int8 and x0.75 from bfloat16 when stored [K, N], x0.45 and
  x0.6 when stored [N, K], where a run reads consecutive bytes. Several rows are so many sums, which share the
  widened weight: x0.7 with two rows of int8, x0.95 with three, x1.3 with five, x1.8 with eight, and from float32
  x1.1 with two and x1.3 with three. Stored [N, K] more than two sums at a time gain nothing.
- Whatever elementwise work produced the activations would be fused in and repeated for every weight; a
  reduction with two results is never fused into its users, so it also serves as the fence (`_settled`).
- What is cut out of a larger array at a place that is data is fused into a loop that reads it once, and copied
  first for one that reads it twice. So the two halves of a weight that one row needs are cut out one by one:
  x0.6 from float32, x0.25 from bfloat16 and x0.3 from int8, against cutting the weight out.
- A slice or a reshape of a bfloat16 or float8 array is computed in float32, and the widening of the whole array is
  hoisted out of any loop around it; the same on integers is free. So such weights travel as `stored.to_bits`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.stored import from_bits

_RUN = 8
_LONGEST_RUN = 18


def can_fuse(inner: int, transposed: bool) -> bool:
    """Whether `few_rows` serves a contraction of this length: other lengths leave a remainder."""
    return inner % (8 * _RUN if transposed else _RUN) == 0


def can_halve(shape: tuple[int, int], dtype: jnp.dtype, transposed: bool) -> bool:
    """Whether `one_row` serves a weight of this shape, `[K, N]` or, transposed, `[N, K]`."""
    part = 2 if transposed else 2 * _run(shape[0], dtype)
    return can_fuse(shape[1 if transposed else 0], transposed) and shape[0] % part == 0


def one_row(x: jax.Array, halves: Sequence[jax.Array], dtype: jnp.dtype, *, transposed: bool) -> jax.Array:
    """`few_rows` of one row and the upper and the lower half of `stored`. Needs `can_halve`."""

    def widen(part: jax.Array) -> jax.Array:
        return from_bits(part, dtype).astype(jnp.float32)

    x = _settled(x)[0]
    return _one_row_transposed(x, halves, widen) if transposed else _one_row(x, halves, widen, dtype)


def few_rows(x: jax.Array, stored: jax.Array, dtype: jnp.dtype, *, transposed: bool) -> jax.Array:
    """Float32 `x [M, K]` times a weight of `dtype`, given as `to_bits`, for small `M`; summed in float32.

    `stored` is `[K, N]`, or `[N, K]` when `transposed`. Needs `can_fuse(K, transposed)`. Returns `[M, N]`.
    """
    (rows, _), (height, breadth) = x.shape, stored.shape

    def widen(part: jax.Array) -> jax.Array:
        return from_bits(part, dtype).astype(jnp.float32)

    if rows == 1 and can_halve((height, breadth), dtype, transposed):
        upper, lower = stored.reshape(2, height // 2, breadth)
        return one_row(x, (upper, lower), dtype, transposed=transposed)
    spare = rows % 2 if transposed else max(2 - rows, 0)
    padded = _settled(jnp.pad(x, ((0, spare), (0, 0))))
    return (_pairs_of_rows if transposed else _rows_together)(padded, stored, widen)[:rows]


def _settled(x: jax.Array) -> jax.Array:
    """`x` itself, bit for bit, through an operation that no user of `x` is fused with."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(2, x.size // 2)
    twice = jnp.broadcast_to(raw[:, None], (2, 2, x.size // 2))
    zero = np.uint32(0)

    def either(a, b):
        return a[0] | b[0], a[1] | b[1]

    halves = jax.lax.reduce((twice[0], twice[1]), (zero, zero), either, (0,))
    return jax.lax.bitcast_convert_type(jnp.concatenate(halves), jnp.float32).reshape(x.shape)


def _sums(terms: Sequence[jax.Array], axis: int) -> tuple[jax.Array, ...]:
    """The sum of each along an axis: two or more, in one loop."""

    def add(totals, values):
        return tuple(a + b for a, b in zip(totals, values, strict=True))

    return tuple(jax.lax.reduce(tuple(terms), (np.float32(0),) * len(terms), add, (axis,)))


def _over_ones(partial: jax.Array, *, leading: bool) -> jax.Array:
    ones = jnp.ones(partial.shape[0 if leading else -1], jnp.float32)
    return jnp.dot(ones, partial, precision="highest") if leading else jnp.dot(partial, ones, precision="highest")


def _run(inner: int, dtype: jnp.dtype) -> int:
    # Measured: longer runs pay for int8 alone.
    return 16 if dtype == jnp.int8 and inner % 32 == 0 else _RUN


def _one_row(x: jax.Array, halves: Sequence[jax.Array], widen: Callable, dtype: jnp.dtype) -> jax.Array:
    # The two sums: the upper and the lower half of K.
    run = _run(x.shape[0], dtype)
    columns, blocks = halves[0].shape[1], x.shape[0] // (2 * run)
    first, second = (widen(halves[i].reshape(blocks, run, columns)) for i in (0, 1))
    x = x.reshape(2, blocks, run, 1)
    upper, lower = _sums((x[0] * first, x[1] * second), 1)
    return (_over_ones(upper, leading=True) + _over_ones(lower, leading=True))[None]


def _one_row_transposed(x: jax.Array, halves: Sequence[jax.Array], widen: Callable) -> jax.Array:
    # The two sums: the upper and the lower half of the rows of the weight.
    rows, inner = halves[0].shape
    run = next(r for r in range(_LONGEST_RUN, 0, -1) if inner % (8 * r) == 0)
    first, second = (widen(halves[i].reshape(rows, run, inner // run)) for i in (0, 1))
    x = x.reshape(1, run, inner // run)
    upper, lower = _sums((x * first, x * second), 1)
    return jnp.concatenate([_over_ones(upper, leading=False), _over_ones(lower, leading=False)])[None]


def _rows_together(x: jax.Array, stored: jax.Array, widen: Callable) -> jax.Array:
    # A sum for each row; all share the widened weight.
    (rows, inner), columns = x.shape, stored.shape[1]
    weight = widen(stored.reshape(inner // _RUN, _RUN, columns))
    x = x.reshape(rows, inner // _RUN, _RUN, 1)
    return jnp.stack([_over_ones(part, leading=True) for part in _sums([row * weight for row in x], 1)])


def _pairs_of_rows(x: jax.Array, stored: jax.Array, widen: Callable) -> jax.Array:
    # Of a weight [N, K]. The two sums: the two rows of a pair, which share the widened weight.
    (rows, inner), columns = x.shape, stored.shape[0]
    pairs, width = rows // 2, inner // _RUN
    weight = widen(stored.reshape(columns, 1, _RUN, width))
    x = x.reshape(pairs, 2, _RUN, width)
    even, odd = _sums((x[None, :, 0] * weight, x[None, :, 1] * weight), 2)
    flat = [_over_ones(p.reshape(-1, width), leading=False).reshape(columns, pairs) for p in (even, odd)]
    return jnp.stack(flat, -1).reshape(columns, rows).T
