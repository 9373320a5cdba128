"""`streamed_matmul` and `fetch`: signatures, validation and dispatch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tuned
from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.stacks import check_layer
from pallas_kernels.streamed_matmul import blocks as sizes
from pallas_kernels.streamed_matmul import kernel, reference, xla
from pallas_kernels.streamed_matmul.blocks import Blocks, Problem
from pallas_kernels.validate import FLOATS, check_dtype, check_shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fetched:
    """First tiles of some weights that are on their way to VMEM. To be used once, in the program that made it.

    Attributes:
      buffers, flags: where they arrive, and the semaphores that tell.
      tiles: which they are.
    """

    buffers: tuple[jax.Array, ...]
    flags: tuple[jax.Array, ...]
    tiles: kernel.Tiles = field(metadata=dict(static=True))


def fetch(
    weights: Sequence[jax.Array],
    after: jax.Array,
    *,
    rows: int,
    size: int,
    layer: jax.typing.ArrayLike | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> tuple[Fetched | None, jax.Array]:
    """Start to copy the first tiles of weights into VMEM, for a `streamed_matmul` later in the program.

    Args:
        weights, layer, blocks: as `streamed_matmul` will get them; one dtype.
        after: an array that what runs beside the copies waits for, such as partial sums that go to other chips.
        rows: of the activations. dtype: of theirs. out_dtype: of the products. Defaults: that of `after`.
        size: bytes to fetch at most, in whole tiles.
        implementation: `"pallas"`, or `"interpret"`, which waits for the copies. None fetches where a program is
            traced for a TPU. Others fetch nothing.

    Returns:
        `(what is on its way, `after`, once it is)`, or `(None, after)` where nothing is fetched: `size` holds no
        tile, or no kernel serves the call.

    Raises:
        InputError: as `streamed_matmul`.
        UnsupportedError: a kernel was asked for by name, and cannot serve the call.
    """
    check_implementation(implementation)
    weights, _, layer = _stacks(weights, None, layer)
    dtype = jnp.dtype(after.dtype if dtype is None else dtype)
    problem = _problem(rows, dtype, weights, jnp.dtype(dtype if out_dtype is None else out_dtype))
    chip = chips.current()
    reasons = sizes.unsupported(problem, blocks, chip)
    if implementation in ("pallas", "interpret") and reasons:
        raise UnsupportedError(f"fetch has no kernel for this call: {'; '.join(reasons)}.")
    here = implementation in ("pallas", "interpret") or (implementation is None and chips.platform() == "tpu")
    if not here or reasons:
        return None, after
    chosen = _chosen(problem, blocks)
    counts = sizes.ahead(problem, chosen, size)
    if not any(counts):
        return None, after
    tiles = kernel.Tiles(problem, chosen, counts)
    buffers, flags, after = kernel.fetch(weights, layer, after, tiles, interpret=implementation == "interpret")
    return Fetched(buffers, flags, tiles), after


def streamed_matmul(
    x: jax.Array,
    weights: Sequence[jax.Array],
    scales: Sequence[jax.Array] | None = None,
    *,
    layer: jax.typing.ArrayLike | None = None,
    fetched: Fetched | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Multiply a few rows by several weights, which stream from HBM one after the other in one kernel.

    Products are summed in float32 (`precision=HIGHEST` for float32), and each result is rounded once.

    Args:
        x: float32, bfloat16 or float16 `[M, K]`.
        weights: each `[K, N]`, with an N of its own; all of one dtype: float32, bfloat16, float16 or int8.
        scales: for each weight float32 `[N]`, needed for int8 and refused otherwise: its output channel n is
            `w[:, n] * scales[n]`.
        layer: int or int32 scalar. Weights and scales then have an axis of L layers before the others, which the
            kernel indexes.
        fetched: what `fetch` gave for these weights and this layer, if anything.
        out_dtype: a floating dtype; that of `x` when None.
        blocks: sizes for the kernel; chosen when None (`pallas_kernels.tuned`).
        implementation: `"reference"`, `"xla"`, `"pallas"` or `"interpret"` (the kernel, interpreted). None takes
            the kernel on TPUs, where it can serve the call (up to 256 rows, K and N in multiples of 128), and the
            XLA form elsewhere. What was fetched is used by the kernel alone.

    Returns:
        For each weight `[M, N]` in `out_dtype`.

    Raises:
        InputError: shapes or dtypes do not fit together, or `blocks` do not fit them or VMEM, or something else was
            fetched.
        UnsupportedError: the kernel asked for by name cannot serve the call.
    """
    check_implementation(implementation)
    check_dtype("x", x, FLOATS)
    check_shape("x", x, (None, None), "M, K")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    stacks, factors, layer = _stacks(weights, scales, layer)
    if factors is None and stacks[0].dtype == jnp.int8:
        raise InputError("scales are needed for int8 weights: one for each weight, float32 [N].")
    if stacks[0].shape[1] != x.shape[1]:
        raise InputError(f"x.shape={x.shape} and weights[0].shape={weights[0].shape}, but K must be the same.")
    problem = _problem(x.shape[0], x.dtype, stacks, out_dtype)
    if fetched is not None and (fetched.tiles.problem != problem or (blocks not in (None, fetched.tiles.blocks))):
        raise InputError(f"fetched is for {fetched.tiles.problem}, but the call is {problem}: fetch what it uses.")
    tiles = partial(_tiles, problem=problem, fetched=fetched, blocks=blocks)

    def pallas(x, weights, scales, layer, interpret):
        lanes = None if scales is None else [s[:, None] for s in scales]
        early = ((), ()) if fetched is None else (fetched.buffers, fetched.flags)
        return kernel.multiply(x, weights, lanes, layer, *early, tiles(), out_dtype=out_dtype, interpret=interpret)

    if fetched is not None and implementation is None:
        return pallas(x, stacks, factors, layer, False)
    unsupported = sizes.unsupported(problem, blocks, chips.current())
    form = partial(_plain, xla, out_dtype=out_dtype)
    found = dispatch(
        "streamed_matmul",
        implementation,
        x,
        stacks,
        factors,
        layer,
        reference=partial(_plain, reference, out_dtype=out_dtype),
        xla=form,
        pallas=pallas,
        unsupported=unsupported,
    )
    return tuple(found)


def _plain(module, x, weights, scales, layer, *, out_dtype):
    return module.streamed_matmul(x, weights, scales, layer[0], out_dtype=out_dtype)


def _tiles(problem: Problem, fetched: Fetched | None, blocks: Blocks | None) -> kernel.Tiles:
    if fetched is not None:
        return fetched.tiles
    return kernel.Tiles(problem, _chosen(problem, blocks), (0,) * len(problem.columns))


def _chosen(problem: Problem, blocks: Blocks | None) -> Blocks:
    if blocks is not None and (reasons := sizes.refusals(problem, blocks)):
        raise InputError(f"blocks={blocks} do not divide the operands: {'; '.join(reasons)}.")
    return tuned.choose("streamed_matmul", sizes, problem, chips.current(), blocks)


def _problem(rows: int, dtype: Any, weights: Sequence[Any], out_dtype: Any) -> Problem:
    columns = tuple(w.shape[2] for w in weights)
    return Problem(rows, weights[0].shape[1], columns, dtype.name, weights[0].dtype.name, out_dtype.name)


def _stacks(
    weights: Sequence[Any], scales: Sequence[Any] | None, layer: Any
) -> tuple[list, list | None, jax.Array]:
    """Weights `[L, K, N]`, scales `[L, N]` and the layer as int32 `[1]`, of operands that are stacked or not."""
    if not weights:
        raise InputError("weights is empty, but at least one is needed.")
    first = weights[0]
    for i, w in enumerate(weights):
        check_dtype(f"weights[{i}]", w, (*FLOATS, jnp.int8))
        at = check_layer(f"weights[{i}]", w, layer, 3)
        if w.dtype != first.dtype or w.shape[:-1] != first.shape[:-1]:
            raise InputError(
                f"weights[{i}] is {w.dtype.name} {w.shape} and weights[0] {first.dtype.name} {first.shape}, but "
                "they may differ in N alone."
            )
    if scales is not None and first.dtype != jnp.int8:
        raise InputError(f"scales are given for {first.dtype.name} weights, but only int8 weights take them.")
    if scales is not None and len(scales) != len(weights):
        raise InputError(f"there are {len(scales)} scales, but as many as weights ({len(weights)}) are needed.")
    for i, s in enumerate(scales or ()):
        check_dtype(f"scales[{i}]", s, (jnp.float32,))
        check_shape(f"scales[{i}]", s, (*weights[i].shape[:-2], weights[i].shape[-1]), "L, N")
    alone = None if scales is None else list(scales)
    if layer is None:
        return [w[None] for w in weights], alone and [s[None] for s in alone], jnp.zeros((1,), jnp.int32)
    return list(weights), alone, jnp.asarray(at, jnp.int32).reshape(1)
