"""`flash_decode` for TPUs: live slots stream through VMEM while the query heads of a group attend to them together.

The cache stays in HBM, stacked, in the layout that XLA gives such arrays by itself: D along the lanes where it is a
multiple of 128, else the slots ("turned"; without that a head_dim of 64 would fill half of each tile). A chunk of
slots of all KV heads is one strided copy. Scores are in base 2, so that exp is a bare power of two.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.flash_decode import blocks as block_sizes
from pallas_kernels.flash_decode.blocks import LANES, Blocks, Problem
from pallas_kernels.flash_decode.stream import Source, Spans, Stream
from pallas_kernels.masks import Rules
from pallas_kernels.merge import merge_partials
from pallas_kernels.stacks import in_hbm
from pallas_kernels.stored import BFLOAT16_BITS

LOG2E = math.log2(math.e)
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
HEADS_AT_ONCE = 8  # unrolled: independent chains that fill each other's waits


@partial(jax.jit, static_argnames=("scale", "softcap", "ring", "blocks", "return_lse", "interpret"))
def pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    layer: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    rules: Rules,
    *,
    scale: float,
    softcap: float | None,
    ring: bool,
    return_lse: bool,
    blocks: Blocks | None,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The arguments of the reference, but v=None where the values are the keys.

    Returns (out,) or (out, lse).
    """
    problem = block_sizes.describe(q, k, v, k_scale, v_scale, alibi_slopes, rules, ring)
    chip = chips.current()
    sizes = tuned.choose("flash_decode", block_sizes, problem, chip, blocks)
    batch, heads, tokens, _ = q.shape
    groups, rows = problem.kv_heads, problem.rows
    cores = block_sizes.cores(problem, sizes, chip)
    out_type, compute = q.dtype, problem.compute
    q = q.astype(jnp.bfloat16 if compute == "bfloat16" else jnp.float32).reshape(batch, groups, rows, -1)

    arrays = dict(k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    stored = [_stored(x, problem, interpret) for x in arrays.values() if x is not None]

    kernel = Kernel(problem, sizes, cores, scale, softcap, sinks is not None, return_lse or sizes.splits > 1)
    scalars = [jnp.clip(layer, 0, k.shape[0] - 1).reshape(1), _lengths(rules)]
    inputs: list[tuple[jax.Array, pl.BlockSpec]] = [(q, kernel.per_item(groups, rows, problem.head_dim))]
    for x in (alibi_slopes, sinks):
        if x is not None:
            wide = jnp.broadcast_to((LOG2E * x).reshape(groups, -1, 1, 1), (groups, heads // groups, tokens, LANES))
            spec = pl.BlockSpec((groups, rows, LANES), lambda *_: (0, 0, 0))
            inputs.append((wide.reshape(groups, rows, LANES), spec))
    if rules.ancestors is not None:
        lowest, tree, depth = _tree(rules, heads // groups)
        scalars.append(lowest)
        inputs += [(x, kernel.per_tree(*x.shape)) for x in (tree, depth)]
    inputs += [(x, pl.BlockSpec(memory_space=pl.ANY)) for x in stored]

    shapes = [(problem.value_dim, jnp.float32 if sizes.splits > 1 else q.dtype)]
    if kernel.lse:
        shapes.append((LANES, jnp.float32))
    buffers = [
        pltpu.VMEM((sizes.depth, sizes.rows, groups, *problem.chunk(name, sizes.kv)), x.dtype)
        for name, x in zip(problem.stored, stored, strict=True)
    ]
    state = (sizes.rows, groups, rows)
    results = pl.pallas_call(
        kernel.body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, kernel.items),
            in_specs=[spec for _, spec in inputs],
            out_specs=[kernel.per_item(groups, rows, dim, split=True) for dim, _ in shapes],
            scratch_shapes=[
                *buffers,
                *[pltpu.VMEM((*state, dim), jnp.float32) for dim in (LANES, LANES, problem.value_dim)],
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((sizes.depth, len(stored))),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((sizes.splits, batch, groups, rows, dim), dtype) for dim, dtype in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(tuned.budget(chip), block_sizes.vmem_bytes(problem, sizes) * 3 // 2 + (8 << 20)),
            disable_bounds_checks=True,
        ),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan") if interpret else False,
        name="flash_decode",
    )(*scalars, *[x for x, _ in inputs])
    out = results[0].reshape(sizes.splits, batch, heads, tokens, -1)
    if not kernel.lse:
        return (out[0].astype(out_type),)
    lse = results[1][..., 0].reshape(sizes.splits, batch, heads, tokens)
    whole, total = (out[0], lse[0]) if sizes.splits == 1 else merge_partials(list(zip(out, lse, strict=True)))
    return (whole.astype(out_type), total) if return_lse else (whole.astype(out_type),)


def _lengths(rules: Rules) -> jax.Array:
    assert rules.lengths is not None
    return rules.lengths


def _stored(x: jax.Array, problem: Problem, interpret: bool) -> jax.Array:
    """An array of the cache with its slots along the lanes where XLA would have them: this moves nothing."""
    if interpret:  # It has no tiles: what a copy of whole tiles reads past the last slot must exist.
        pad = [(0, 0)] * x.ndim
        pad[3] = (0, -x.shape[3] % problem.align)
        x = jnp.pad(x, pad, constant_values=0 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.nan)
    return in_hbm(jnp.swapaxes(x, -1, -2) if x.ndim == 5 and problem.turned(x.shape[-1]) else x, interpret)


def _tree(rules: Rules, share: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ancestor mask for the kernel: each row's least depth; per query row its ancestors, then two rows with
    the nodes' depths and whether any query sees them; per query row its own depth."""
    mask = rules.ancestors
    assert mask is not None
    depths = jnp.maximum(jnp.sum(mask, -1, dtype=jnp.int32) - 1, 0)
    distance = depths[:, None, :] - depths[:, :, None]
    if rules.left is not None:
        mask &= distance >= -rules.left
    if rules.right is not None:
        mask &= distance <= rules.right
    extra = jnp.stack([depths.astype(jnp.float32), mask.any(1).astype(jnp.float32)], axis=1)
    tree = jnp.concatenate([jnp.tile(mask.astype(jnp.float32), (1, share, 1)), extra], axis=1)
    tree = jnp.pad(tree, ((0, 0), (0, -tree.shape[1] % 8), (0, -tree.shape[2] % LANES)))
    own = jnp.broadcast_to(jnp.tile(depths, (1, share))[..., None], (*tree.shape[:1], share * rules.queries, LANES))
    return depths.min(-1), tree, own


@dataclass(frozen=True)
class Columns:
    """How the slots of a chunk look to a row's queries; arrays [R, kv] but `used`, which is [1, kv] or [kv, 1]."""

    seen: jax.Array | None  # None: every query sees every slot
    used: jax.Array | None  # slots that some query sees: the others may hold nan
    distance: jax.Array | None  # key position minus query position, where ALiBi needs it


@dataclass(frozen=True)
class Kernel:
    """The body of one call, and its blocks."""

    problem: Problem
    sizes: Blocks
    cores: int
    scale: float
    softcap: float | None
    sinks: bool
    lse: bool

    @property
    def row_groups(self) -> int:
        return self.problem.batch // self.sizes.rows

    @property
    def items(self) -> int:
        return self.row_groups * self.sizes.splits // self.cores

    def per_item(self, *shape: int, split: bool = False) -> pl.BlockSpec:
        def index(core, i, *_):
            item, zeros = core * self.items + i, (0,) * len(shape)
            if self.sizes.splits == 1:
                return (0,) * split + (item, *zeros)
            groups = jnp.int32(self.row_groups)
            group = (jax.lax.rem(item, groups), *zeros)
            return (jax.lax.div(item, groups), *group) if split else group

        return pl.BlockSpec(((None,) if split else ()) + (self.sizes.rows, *shape), index)

    def per_tree(self, trees: int, *shape: int) -> pl.BlockSpec:
        if trees > 1:
            return self.per_item(*shape)
        return pl.BlockSpec((1, *shape), lambda *_: (0, 0, 0))

    def body(self, *refs: Any) -> None:
        p, sizes = self.problem, self.sizes
        refs_left = iter(refs)
        layer, lengths = next(refs_left), next(refs_left)
        lowest = next(refs_left) if p.tree else None
        q = next(refs_left)
        slopes = next(refs_left) if p.alibi else None
        sinks = next(refs_left) if self.sinks else None
        tree, depth = (next(refs_left), next(refs_left)) if p.tree else (None, None)
        hbm = [next(refs_left) for _ in p.stored]
        out = next(refs_left)
        lse = next(refs_left) if self.lse else None
        buffers = {name: next(refs_left) for name in p.stored}
        peak, total, acc, state, semaphores = refs_left

        core, i = pl.program_id(0), pl.program_id(1)
        spans = Spans(
            tokens=p.tokens,
            slots=p.slots,
            kv=sizes.kv,
            align=p.align,
            rows=sizes.rows,
            splits=sizes.splits,
            row_groups=self.row_groups,
            items=self.items,
            left=p.left,
            ring=p.ring,
            lengths=lambda row: lengths[row],
        )
        sources = [Source(x, buffers[name], p.lanes(name)) for name, x in zip(p.stored, hbm, strict=True)]
        stream = Stream(spans, sources, layer[0], core, sizes.depth, state, semaphores)
        row, split = spans.item(core, i)
        pl.when(i == 0)(stream.begin)
        for u in range(sizes.rows):
            peak[u] = jnp.full(peak.shape[1:], HIDDEN, jnp.float32)
            total[u] = jnp.zeros(total.shape[1:], jnp.float32)
            acc[u] = jnp.zeros(acc.shape[1:], jnp.float32)
        if sinks is not None:

            @pl.when(split == 0)
            def _():
                for u in range(sizes.rows):
                    peak[u] = sinks[...]
                    total[u] = jnp.ones(total.shape[1:], jnp.float32)

        def attend(slot, j, hidden: bool) -> None:
            columns = []
            for u in range(sizes.rows):
                low, high, start = spans.live(row + u, split)
                place = (low, high, start + j * sizes.kv, lengths[row + u])
                t = u if tree is not None and tree.shape[0] > 1 else 0
                nodes = None
                if tree is not None and depth is not None and lowest is not None:
                    nodes = tree[t], depth[t][:, :1], lowest[row + u if lowest.shape[0] > 1 else 0]
                columns.append(self.columns(place, nodes, hidden))
            many = math.gcd(p.kv_heads, HEADS_AT_ONCE)

            def heads(first):
                units = [(u, first + h) for u in range(sizes.rows) for h in range(many)]
                chunk = [{name: x[slot, u, h] for name, x in buffers.items()} for u, h in units]
                slope = [None if slopes is None else slopes[h][:, :1] for _, h in units]
                column = [columns[u] for u, _ in units]
                old = [(peak[u, h], total[u, h], acc[u, h]) for u, h in units]
                new = self.update([q[u, h] for u, h in units], chunk, slope, column, old)
                for (u, h), values in zip(units, new, strict=True):
                    peak[u, h], total[u, h], acc[u, h] = values

            if many == p.kv_heads:
                heads(0)
            else:
                jax.lax.fori_loop(0, p.kv_heads // many, lambda h, c: (heads(h * many), c)[1], 0)

        def step(j, carry):
            slot = stream.next(i, j)
            clean = None if sizes.rows > 1 or p.ring else self.clean(*spans.live(row, split), j, lengths[row])
            if clean is None:
                attend(slot, j, True)
            else:
                pl.when(clean)(lambda: attend(slot, j, False))
                pl.when(jnp.logical_not(clean))(lambda: attend(slot, j, True))
            return carry

        jax.lax.fori_loop(0, spans.chunks(row, split), step, 0)
        for u in range(sizes.rows):
            some = total[u] > 0
            safe = jnp.where(some, total[u], 1.0)
            out[u] = (acc[u] / safe[..., :1]).astype(out.dtype)
            if lse is not None:
                lse[u] = jnp.where(some, (peak[u] + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)

    def clean(self, low, high, start, j, length):
        """Whether every query sees every slot of a chunk."""
        p = self.problem
        first = start + j * self.sizes.kv
        end = first + self.sizes.kv
        oldest = length - p.tokens
        clean = (first >= low) & (end <= high) & (end <= (oldest if p.tree else oldest + 1))
        return clean if p.left is None else clean & (first >= length - 1 - p.left)

    def columns(self, place: tuple, nodes: tuple | None, hidden: bool) -> Columns:
        p = self.problem
        low, high, start, length = place
        oldest = length - p.tokens
        if nodes is None:
            query = oldest + jax.lax.broadcasted_iota(jnp.int32, (p.rows, 1), 0) % p.tokens
        else:
            query = oldest + nodes[1]

        def positions(shape: tuple[int, int], axis: int):
            slot = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            held = slot
            if p.ring:
                newest = jax.lax.rem(length - 1, jnp.int32(p.slots))  # an empty row has no chunks
                held = slot + (length - 1 - newest) - jnp.where(slot > newest, p.slots, 0)
            return held, (slot >= low) & (slot < high)

        held, live = positions((1, self.sizes.kv), 1)
        if not hidden:
            return Columns(None, None, (held - query).astype(jnp.float32) if p.alibi else None)
        sees = None
        if nodes is not None:
            node = jax.lax.broadcasted_iota(jnp.int32, (nodes[0].shape[1], self.sizes.kv), 0)
            hot = (node == held - oldest).astype(jnp.float32)
            looked = _dot(nodes[0], hot)
            inside = held >= oldest
            held = jnp.where(inside, oldest + looked[p.rows : p.rows + 1].astype(jnp.int32), held)
            sees = jnp.where(inside, looked[: p.rows], 1.0) > 0.5
        distance = held - query
        seen = live & ((distance <= 0) if sees is None else sees)
        if p.left is not None:
            seen &= distance >= -p.left
        used = None
        if p.float_cache:
            turned = p.turned(p.value_dim)
            held, live = positions((1, self.sizes.kv) if turned else (self.sizes.kv, 1), int(turned))
            nearest = oldest if nodes is None else oldest + nodes[2]
            used = live if p.left is None else live & (held >= nearest - p.left)
            if nodes is not None:
                any_sees = nodes[0][p.rows + 1 : p.rows + 2]
                if turned:
                    counted = _dot(any_sees, hot)
                else:
                    node = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.kv, any_sees.shape[1]), 1)
                    counted = jnp.sum(jnp.where(node == held - oldest, any_sees, 0.0), 1, keepdims=True)
                inside = held >= oldest
                used = (inside & live & (counted > 0.5)) | (jnp.logical_not(inside) & used)
        return Columns(seen, used, distance.astype(jnp.float32) if p.alibi else None)

    def update(self, queries, chunks, slopes, columns, old):
        """Running maximum, sum and weighted values of some (row, head) units after one more chunk.

        Stage by stage over all units rather than unit by unit, so that their waits overlap.
        """
        p = self.problem
        scores = []
        for q, chunk, slope, column in zip(queries, chunks, slopes, columns, strict=True):
            x = _dot(q, self.value(chunk["k"]), turned=not p.turned(p.head_dim))
            x *= self.scale * (1.0 if self.softcap else LOG2E)
            if "k_scale" in chunk:
                x *= chunk["k_scale"][None]
            if self.softcap is not None:
                x = self.softcap * LOG2E * jnp.tanh(x * (1 / self.softcap))
            if slope is not None:
                x += slope * column.distance
            scores.append(x if column.seen is None else jnp.where(column.seen, x, HIDDEN))
        peaks = [jnp.maximum(state[0], jnp.max(x, 1, keepdims=True)) for x, state in zip(scores, old, strict=True)]
        weights = [jnp.exp2(x - peak[:, :1]) for x, peak in zip(scores, peaks, strict=True)]
        weights = [
            w if column.seen is None else jnp.where(column.seen, w, 0.0)
            for w, column in zip(weights, columns, strict=True)
        ]
        new = []
        for weight, chunk, column, peak, state in zip(weights, chunks, columns, peaks, old, strict=True):
            fade = jnp.exp2(state[0] - peak)
            total = state[1] * fade + jnp.sum(weight, 1, keepdims=True)
            if "v_scale" in chunk:
                scale = chunk["v_scale"][None]
                weight *= scale if column.seen is None else jnp.where(column.seen, scale, 0.0)
            values = self.value(chunk["v" if "v" in chunk else "k"])
            if column.used is not None:
                values = jnp.where(column.used, values, jnp.zeros_like(values))
            part = _dot(weight.astype(values.dtype), values, turned=p.turned(p.value_dim))
            new.append((peak, total, state[2] * fade[:, :1] + part))
        return new

    def value(self, x: jax.Array) -> jax.Array:
        """Stored values as they enter a product."""
        if x.dtype == BFLOAT16_BITS:
            x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
        return x.astype(self.problem.compute)


def _dot(a: jax.Array, b: jax.Array, turned: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, summed in float32; float32 operands exactly."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)
