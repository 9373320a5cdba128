"""The body of the `flash_attention` kernel: one block of queries against one block of keys.

Scores are held transposed, [keys, query columns]: S' = K Q', O' = V' P'. The maximum then runs down the sublanes,
the state of the softmax is one row, and the 256 columns of a wide matrix unit are filled with queries, where V's
head size would fill half. V' may get a row of ones, so that the matrix unit sums the weights too.

The columns are the queries of several heads that share a key head: tile of queries by tile, in it head by head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention import schedule, visibility
from pallas_kernels.flash_attention.blocks import Blocks

LOG2E = math.log2(math.e)
LOWEST = -1e30  # below every score, and finite, so that differences of maxima are never nan


@dataclass(frozen=True)
class Form:
    """What is fixed while tracing.

    minor: whether the tokens of q, k, v and the result run along the lanes, [.., D, tokens]; else [.., tokens, D].
    """

    blocks: Blocks
    rules: visibility.Static
    dim: int
    value_dim: int
    dtype: Any
    scale: float
    softcap: float | None
    patterns: tuple[int, ...]
    q_minor: bool
    k_minor: bool
    v_minor: bool
    out_minor: bool

    @property
    def columns(self) -> int:
        return self.blocks.heads * self.blocks.q

    @property
    def tile_columns(self) -> int:
        return self.blocks.heads * self.blocks.tile_q

    @property
    def ones(self) -> int:
        """Rows of ones under V': a tile of memory full, or none where the vector unit adds the weights."""
        if not self.blocks.ones:
            return 0
        return 8 if self.dtype == jnp.float32 else 16

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Start and width of the units of columns of one tile of queries."""
        width = min(self.blocks.width, self.tile_columns)
        return [(at, min(width, self.tile_columns - at)) for at in range(0, self.tile_columns, width)]


@dataclass(frozen=True)
class Refs:
    """References by name; those of masks that are not asked for are None."""

    steps: Any  # SMEM, with the four below
    tiles: Any
    limits: Any
    offsets: Any
    above: Any  # for the places of k and v alone
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    scaled: Any  # scratch: q times the scale, [columns, D] or [D, columns]
    keys: Any  # scratch: k as [keys, D], if it comes as [D, keys]
    values: Any  # scratch: v' and ones, [Dv + ones, keys]
    peak: Any  # scratch: [8, columns], row 0
    total: Any  # scratch: [8, columns], row 0, or all to be summed where the vector unit adds
    acc: Any  # scratch: [Dv, columns]
    sinks: Any = None  # float32 [1, columns]
    slopes: Any = None
    q_positions: Any = None  # int32 [1, columns]
    q_segments: Any = None
    kv_segments: Any = None  # int32 [1, keys]
    ancestors: Any = None  # [nodes, columns]
    depths: Any = None
    cells: Any = None


@dataclass(frozen=True)
class Place:
    """Scalars of one step."""

    q_block: Any
    kv_block: Any
    offset: Any
    limit: Any


@dataclass(frozen=True)
class Unit:
    """One product: some columns of a tile of queries against a tile of keys of the block."""

    first: Any  # column
    width: int
    inside: int  # the first column's query within the tile of queries
    tile: Any  # of queries
    key: Any
    masked: bool


def body(form: Form, refs: Refs, index: Any) -> None:
    """One step of the grid (rows, blocks of heads, steps); `index` is its place in the lists of steps."""
    step = refs.steps[index]
    row = pl.program_id(0)
    mask = schedule.MAX_BLOCKS - 1
    place = Place(
        step & mask,
        step >> schedule.BITS & mask,
        refs.offsets[jnp.minimum(row, refs.offsets.shape[0] - 1)],
        refs.limits[jnp.minimum(row, refs.limits.shape[0] - 1)],
    )
    kind = step >> schedule.KIND

    pl.when(step & schedule.FIRST != 0)(lambda: _begin(form, refs))
    b = form.blocks
    across, down = b.q // b.tile_q, b.kv // b.tile_kv
    everything = (schedule.FULL,) * (across * down)
    word = refs.tiles[index]
    known = (*form.patterns, schedule.word(everything))
    for pattern in known:
        states = schedule.tile_list(pattern, across * down)
        units = [
            Unit(
                a * form.tile_columns + at,
                width,
                at % b.tile_q,
                a,
                c * b.tile_kv,
                states[a * down + c] == schedule.PARTIAL,
            )
            for c in range(down)
            for a in range(across)
            if states[a * down + c] != schedule.DEAD
            for at, width in form.widths
        ]

        @pl.when((kind != schedule.DEAD) & (word == pattern))
        def _(units=units):
            _take_block(form, refs)
            _run(form, refs, place, units)

    other = kind == schedule.PARTIAL
    for pattern in known:
        other &= word != pattern

    @pl.when(other)
    def _():
        _take_block(form, refs)

        def tile(n, _):
            a, c = jax.lax.div(n, down), jax.lax.rem(n, down)
            state = word >> 2 * n & 3
            for wanted in (schedule.FULL, schedule.PARTIAL):
                units = [
                    Unit(
                        a * form.tile_columns + at,
                        width,
                        at % b.tile_q,
                        a,
                        c * b.tile_kv,
                        wanted == schedule.PARTIAL,
                    )
                    for at, width in form.widths
                ]
                pl.when(state == wanted)(lambda units=units: _run(form, refs, place, units))
            return 0

        jax.lax.fori_loop(0, across * down, tile, 0)

    pl.when(step & schedule.LAST != 0)(lambda: _end(form, refs))


def _begin(form: Form, refs: Refs) -> None:
    """A new block of queries: its scaled copy in the order of the columns, and an empty softmax."""
    b = form.blocks
    factor = form.scale / form.softcap if form.softcap else form.scale * LOG2E
    for a in range(b.q // b.tile_q):
        for h in range(b.heads):
            start = a * form.tile_columns + h * b.tile_q
            columns, queries = pl.ds(start, b.tile_q), pl.ds(a * b.tile_q, b.tile_q)
            if form.q_minor:
                refs.scaled[:, columns] = _times(refs.q[0, h, :, queries], factor)
            else:
                refs.scaled[columns, :] = _times(refs.q[0, h, queries, :], factor)
    refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)
    if refs.sinks is None:
        refs.peak[...] = jnp.full(refs.peak.shape, LOWEST, jnp.float32)
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    else:
        refs.peak[...] = jnp.broadcast_to(refs.sinks[0] * LOG2E, refs.peak.shape)
        refs.total[...] = jnp.full(refs.total.shape, 1.0 if form.ones else 0.125, jnp.float32)


def _times(x: jax.Array, factor: float) -> jax.Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _take_block(form: Form, refs: Refs) -> None:
    """The block of keys as the products want it."""
    if form.k_minor:
        refs.keys[...] = refs.k[0, 0].T
    refs.values[: form.value_dim] = refs.v[0, 0] if form.v_minor else refs.v[0, 0].T
    if form.ones:
        refs.values[form.value_dim :] = jnp.ones((form.ones, form.blocks.kv), form.dtype)


def _dot(form: Form, a: jax.Array, b: jax.Array, contract_b: int) -> jax.Array:
    """a [m, k] times b, whose axis `contract_b` has k; float32 at full precision."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if form.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _run(form: Form, refs: Refs, place: Place, units: Sequence[Unit]) -> None:
    """Softmax over the units, in order. Some products of queries and keys are begun early, so that the matrix units
    work on them while the weights of an older unit are made."""
    ready = {}
    for n in range(len(units) + form.blocks.ahead):
        if n < len(units):
            ready[n] = _scores(form, refs, place, units[n])
        done = n - form.blocks.ahead
        if done >= 0:
            _fold(form, refs, units[done], *ready.pop(done))


def _scores(form: Form, refs: Refs, place: Place, unit: Unit) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scores times log2(e) [keys, columns], their maximum over the keys, and the used keys where masked."""
    b = form.blocks
    columns = pl.ds(_aligned(unit.first, unit.width), unit.width)
    keys = pl.ds(_aligned(unit.key, b.tile_kv), b.tile_kv)
    k = refs.keys[keys, :] if form.k_minor else refs.k[0, 0, keys, :]
    if form.q_minor:
        s = _dot(form, k, refs.scaled[:, columns], 0)
    else:
        s = _dot(form, k, refs.scaled[columns, :], 1)
    if form.softcap:
        s = jnp.tanh(s) * (form.softcap * LOG2E)
    used = None
    if unit.masked or refs.slopes is not None:
        tile = _tile(form, refs, place, unit, columns, keys)
        if refs.slopes is not None:
            distance = visibility.distances(form.rules, tile).astype(jnp.float32)
            s += distance * (refs.slopes[0, :, columns] * LOG2E)
        if unit.masked:
            seen = visibility.visible(form.rules, tile)
            s = jnp.where(seen, s, -jnp.inf)
            used = visibility.used_keys(form.rules, tile, seen)
    return s, jnp.max(s, axis=0, keepdims=True), used


def _aligned(start: Any, size: int) -> Any:
    """The start with what the compiler may know of it: it is a multiple of the size's largest power of two."""
    return start if isinstance(start, int) else pl.multiple_of(start, size & -size)


def _tile(form: Form, refs: Refs, place: Place, unit: Unit, columns: Any, keys: Any) -> visibility.Tile:
    b = form.blocks
    first = place.q_block * b.q + unit.tile * b.tile_q + unit.inside
    span = min(b.tile_q, unit.width)

    def cut(ref: Any, at: Any) -> Any:
        return None if ref is None else ref[0, 0, :, at]

    return visibility.Tile(
        keys=b.tile_kv,
        columns=unit.width,
        span=span,
        first_key=place.kv_block * b.kv + unit.key,
        first_query=first,
        last_query=jnp.minimum(first + span, form.rules.queries) - 1,
        offset=place.offset,
        limit=place.limit,
        q_positions=cut(refs.q_positions, columns),
        q_segments=cut(refs.q_segments, columns),
        kv_segments=cut(refs.kv_segments, keys),
        ancestors=cut(refs.ancestors, columns),
        depths=None if refs.depths is None else refs.depths[0],
        cells=None if refs.cells is None else refs.cells[0],
    )


def _fold(form: Form, refs: Refs, unit: Unit, s: jax.Array, top: jax.Array, used: jax.Array | None) -> None:
    """Adds one unit to the running maximum, sum and weighted values (Milakov and Gimelshein 2018, 1805.02867)."""
    columns = pl.ds(_aligned(unit.first, unit.width), unit.width)
    keys = pl.ds(_aligned(unit.key, form.blocks.tile_kv), form.blocks.tile_kv)
    old = refs.peak[0:1, columns]
    new = jnp.maximum(old, top)
    weights = jnp.exp2(s - new)
    fade = jnp.exp2(old - new)
    values = refs.values[:, keys]
    if used is not None:
        values = jnp.where(used, values.astype(jnp.float32), 0.0).astype(form.dtype)
    sums = _dot(form, values, weights.astype(form.dtype), 0)
    refs.peak[0:1, columns] = new
    if form.ones:
        refs.total[0:1, columns] = refs.total[0:1, columns] * fade + sums[form.value_dim : form.value_dim + 1]
    else:
        eighths = jnp.sum(weights.reshape(-1, 8, unit.width), axis=0)
        refs.total[:, columns] = refs.total[:, columns] * fade + eighths
    refs.acc[:, columns] = refs.acc[:, columns] * fade + sums[: form.value_dim]


def _end(form: Form, refs: Refs) -> None:
    """The result of a block of queries."""
    b = form.blocks
    total = refs.total[0:1] if form.ones else jnp.sum(refs.total[...], axis=0, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    refs.lse[0, 0, 0] = jnp.where(some, refs.peak[0:1] / LOG2E + jnp.log(total), -jnp.inf)
    part = 1.0 / total
    for a in range(b.q // b.tile_q):
        for h in range(b.heads):
            columns = pl.ds(a * form.tile_columns + h * b.tile_q, b.tile_q)
            queries = pl.ds(a * b.tile_q, b.tile_q)
            out = refs.acc[:, columns] * part[:, columns.start : columns.start + b.tile_q]
            if form.out_minor:
                refs.out[0, h, :, queries] = out.astype(refs.out.dtype)
            else:
                refs.out[0, h, queries, :] = out.T.astype(refs.out.dtype)
