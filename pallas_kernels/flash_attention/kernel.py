"""`flash_attention` for TPUs (Dao et al. 2022, arXiv:2205.14135): how the arrays reach the kernel's body.

The grid is rows x blocks of heads x steps; the list of steps (`schedule`) names the pairs of blocks that have a key
to see, so the others are neither computed nor copied. Arrays with a head size that is no multiple of 128 come with
the tokens along the lanes: the other way a TPU pads them to 128 in HBM, at twice the bytes for 64.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.errors import InputError
from pallas_kernels.flash_attention import blocks as block_sizes
from pallas_kernels.flash_attention import schedule, visibility
from pallas_kernels.flash_attention.blocks import LANES, Blocks, Problem
from pallas_kernels.flash_attention.body import Form, Refs, body
from pallas_kernels.masks import Rules, cell_sizes, query_positions

PREFETCHED = 5  # of Refs: steps, tiles, limits, offsets, above
MOST_NODES = 2048  # of a tree: its mask stays in VMEM
MOST_CELLS = 1 << 20


def unsupported(dtype: Any, dim: int, value_dim: int, rules: Rules) -> list[str]:
    """What the kernel cannot do of a call, a reason each."""
    reasons = []
    if dtype not in (jnp.float32, jnp.bfloat16):
        reasons.append(f"{dtype.name} has no matrix unit: cast to bfloat16 or float32")
    if dim % 8 or value_dim % 8:
        reasons.append(f"head sizes {dim} and {value_dim} are not multiples of 8")
    if rules.ancestors is not None and rules.queries > MOST_NODES:
        reasons.append(f"ancestor_mask has {rules.queries} nodes, and at most {MOST_NODES} fit")
    if rules.blocks is not None and rules.blocks[0].size > MOST_CELLS:
        reasons.append(f"block_mask has {rules.blocks[0].size} cells a head, and at most {MOST_CELLS} fit")
    return reasons


def problem_of(q: Any, k: Any, v: Any, rules: Rules) -> Problem:
    batch, heads, queries, dim = q.shape
    right = 0 if rules.causal else rules.right
    mask_bytes = 0
    if rules.ancestors is not None:
        mask_bytes += 8 * queries * LANES * 8
    if rules.blocks is not None:
        mask_bytes += 4 * rules.blocks[0].size
    return Problem(
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        queries=queries,
        keys=k.shape[2],
        head_dim=dim,
        value_dim=v.shape[3],
        dtype=q.dtype.name,
        causal=rules.causal,
        window=None if rules.left is None or right is None else rules.left + right + 1,
        lists=_lists(rules, batch),
        per_head_masks=rules.blocks is not None and rules.blocks.shape[0] > 1,
        mask_bytes=mask_bytes,
    )


def _lists(rules: Rules, batch: int) -> int:
    by_row = (rules.q_offset, rules.lengths, rules.q_segments, rules.ancestors)
    rows = batch if any(x is not None and x.shape[0] > 1 for x in by_row) else 1
    return rows * (1 if rules.blocks is None else rules.blocks.shape[0])


def pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    slopes: jax.Array | None,
    rules: Rules,
    layer: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None,
    offset: int | None,
    blocks: Blocks | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The arguments and results of the reference, and a layer where k and v are stacked.

    `offset` is the value of rules.q_offset where it is known.
    """
    batch, heads, queries, dim = q.shape
    keys, value_dim = v.shape[-2:]
    above = jnp.zeros(1, jnp.int32)  # rows of k and v before row 0
    if layer is not None:
        above = (layer * batch).reshape(1)
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    problem = problem_of(q, k, v, rules)
    chip = chips.current()
    sizes = tuned.choose("flash_attention", block_sizes, problem, chip, blocks).fit(problem)
    need = block_sizes.smem_bytes(problem, sizes)
    if need > chip.smem * 3 // 4:
        raise InputError(
            f"blocks={sizes} make lists of {need} bytes in flash_attention, but a {chip.name} has {chip.smem} "
            "bytes of SMEM, three quarters of it for them: make q and kv larger."
        )
    grain = schedule.Grain(sizes.q, sizes.kv, sizes.tile_q, sizes.tile_kv)
    nq, _ = grain.counts(queries, keys)
    no_arrays = all(x is None for x in (rules.lengths, rules.q_segments, rules.blocks, rules.ancestors))
    if offset is not None and no_arrays:
        xp, planned = np, replace(rules, q_offset=np.array([offset], np.int32))
    else:
        xp, planned = jnp, rules
    plan = schedule.schedule(schedule.tile_states(planned, grain, sizes.heads, xp), grain, xp)

    form = Form(
        blocks=sizes,
        rules=visibility.Static(
            queries=queries,
            causal=rules.causal,
            left=rules.left,
            right=rules.right,
            segments=rules.q_segments is not None,
            tree=rules.ancestors is not None,
            cells=None if rules.blocks is None else cell_sizes(rules),
        ),
        dim=dim,
        value_dim=value_dim,
        dtype=q.dtype,
        scale=scale,
        softcap=softcap,
        patterns=_patterns(rules, offset, grain),
        q_minor=dim % LANES != 0 and sizes.tile_q >= LANES,
        k_minor=dim % LANES != 0 and keys >= LANES,
        v_minor=value_dim % LANES != 0 and keys >= LANES,
        out_minor=value_dim % LANES != 0 and sizes.tile_q >= LANES,
    )
    arrays = _Arrays(form, batch, heads, k.shape[1], nq)
    lists = plan.steps.shape[:2]
    row_lists, head_lists = (size > 1 for size in lists)
    length = plan.steps.shape[2]
    known_offset = rules.q_offset if offset is None else np.array([offset])
    limits = np.array([keys]) if rules.lengths is None else jnp.minimum(rules.lengths, keys)
    scalars = (plan.steps, plan.tiles, limits, known_offset, above)
    prefetched = [jnp.asarray(x, jnp.int32).reshape(-1) for x in scalars]

    def index(row: Any, head: Any, step: Any) -> Any:
        row, head = row if row_lists else 0, head if head_lists else 0
        return (row * lists[1] + head) * length + step

    inputs = arrays.inputs(q, k, v, sinks, slopes, rules)
    names = [name for name, *_ in inputs]
    stacked = () if layer is None else ("k", "v")

    def spec(shape: tuple[int, ...], place: Any, stacked: bool = False) -> pl.BlockSpec:
        def index_map(row, head, step, steps, *scalars):
            word = steps[index(row, head, step)]
            mask = schedule.MAX_BLOCKS - 1
            row = row + scalars[-1][0] if stacked else row
            return place(row, head, word & mask, word >> schedule.BITS & mask)

        return pl.BlockSpec(shape, index_map)

    def run(*refs):
        scalars, rest = refs[:PREFETCHED], refs[PREFETCHED:]
        given, (out, lse, *scratch) = rest[: len(names)], rest[len(names) :]
        held = Refs(
            *scalars, out=out, lse=lse, **arrays.scratch_names(scratch), **dict(zip(names, given, strict=True))
        )
        body(form, held, index(pl.program_id(0), pl.program_id(1), pl.program_id(2)))

    (out_shape, out_spec), (lse_shape, lse_spec) = arrays.outputs()
    out, lse = pl.pallas_call(
        run,
        out_shape=[out_shape, lse_shape],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=PREFETCHED,
            grid=(batch, heads // sizes.heads, plan.length if xp is jnp else length),
            in_specs=[spec(shape, place, name in stacked) for name, _, shape, place in inputs],
            out_specs=[spec(*out_spec), spec(*lse_spec)],
            scratch_shapes=arrays.scratch(),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tuned.budget(chip),
            disable_bounds_checks=True,
        ),
        interpret=pltpu.InterpretParams(out_of_bounds_reads="uninitialized") if interpret else False,
        name="flash_attention",
    )(*prefetched, *(x for _, x, *_ in inputs))
    return arrays.results(out, lse)


def _patterns(rules: Rules, offset: int | None, grain: schedule.Grain) -> tuple[int, ...]:
    """Of the mask as if no arrays took part, and queries began at a block of keys where that is not known."""
    plain = replace(
        rules,
        q_offset=np.array([offset or 0], np.int32),
        lengths=None,
        q_segments=None,
        kv_segments=None,
        blocks=None,
        ancestors=None,
    )
    return schedule.patterns(plain, grain)


@dataclass(frozen=True)
class _Arrays:
    """The arrays of one call in the kernel's layouts.

    Each comes with the shape of its block and a function that gives the block's place from those of the row, the
    heads, the queries and the keys.
    """

    form: Form
    batch: int
    heads: int
    groups: int
    q_blocks: int

    @property
    def share(self) -> int:
        return self.heads // self.groups

    def inputs(self, q, k, v, sinks, slopes, rules: Rules) -> list[tuple[str, jax.Array, tuple[int, ...], Any]]:
        form, b = self.form, self.form.blocks

        def group(h: Any) -> Any:
            return h if b.heads == self.share else jax.lax.div(h, self.share // b.heads)

        made = []

        def add(name: str, x: jax.Array, shape: tuple[int, ...], place: Any) -> None:
            made.append((name, x, shape, place))

        def tokens(name: str, x: jax.Array, minor: bool, heads: int, size: int, place: Any) -> None:
            """x [B, heads, tokens, dim], `size` tokens a block; place gives row, heads and block of tokens."""
            shape = (1, heads, x.shape[3], size) if minor else (1, heads, size, x.shape[3])

            def at(*where):
                row, head, token = place(*where)
                return (row, head, 0, token) if minor else (row, head, token, 0)

            add(name, x.swapaxes(2, 3) if minor else x, shape, at)

        tokens("q", q, form.q_minor, b.heads, b.q, lambda r, h, i, j: (r, h, i))
        tokens("k", k, form.k_minor, 1, b.kv, lambda r, h, i, j: (r, group(h), j))
        tokens("v", v, form.v_minor, 1, b.kv, lambda r, h, i, j: (r, group(h), j))
        for name, x in (("sinks", sinks), ("slopes", slopes)):
            if x is not None:
                x = jnp.broadcast_to(x.reshape(-1, 1, 1, b.heads, 1), (*self._heads_of_columns, b.tile_q))
                add(name, x.reshape(-1, 1, form.columns), (1, 1, form.columns), lambda r, h, i, j: (h, 0, 0))

        def by_query(name: str, x: jax.Array) -> None:
            """x [B | 1, m, T]."""
            rows, depth = x.shape[:2]
            x = self._columns(x)
            row = (lambda r: r) if rows > 1 else (lambda r: 0)
            add(name, x, (1, 1, depth, form.columns), lambda r, h, i, j: (row(r), i, 0, 0))

        if rules.q_segments is not None:
            assert rules.kv_segments is not None
            by_query("q_segments", rules.q_segments[:, None])
            ids = rules.kv_segments
            blocks = -(-ids.shape[1] // b.kv)
            ids = jnp.pad(ids, ((0, 0), (0, blocks * b.kv - ids.shape[1]))).reshape(-1, blocks, 1, b.kv)
            add("kv_segments", ids, (1, 1, 1, b.kv), lambda r, h, i, j: (r, j, 0, 0))
        if rules.ancestors is not None:
            by_query("q_positions", query_positions(rules, jnp.arange(rules.queries))[:, None])
            spare = -rules.queries % LANES
            nodes = jnp.pad(rules.ancestors.swapaxes(1, 2).astype(jnp.bfloat16), ((0, 0), (0, spare), (0, 0)))
            by_query("ancestors", nodes)
            depths = jnp.maximum(rules.ancestors.sum(-1) - 1, 0).astype(jnp.float32)
            depths = jnp.pad(depths, ((0, 0), (0, spare)))[:, None]
            row = (lambda r: r) if depths.shape[0] > 1 else (lambda r: 0)
            add("depths", depths, (1, *depths.shape[1:]), lambda r, h, i, j: (row(r), 0, 0))
        if rules.blocks is not None:
            cells = rules.blocks.swapaxes(1, 2).astype(jnp.bfloat16)
            cells = jnp.pad(cells, ((0, 0), (0, -cells.shape[1] % 16), (0, -cells.shape[2] % LANES)))
            head = (lambda h: h) if cells.shape[0] > 1 else (lambda h: 0)
            add("cells", cells, (1, *cells.shape[1:]), lambda r, h, i, j: (head(h), 0, 0))
        return made

    @property
    def _heads_of_columns(self) -> tuple[int, int, int, int]:
        b = self.form.blocks
        return self.heads // b.heads, 1, b.q // b.tile_q, b.heads

    def _columns(self, x: jax.Array) -> jax.Array:
        """[.., m, T] -> [.., query blocks, m, columns]."""
        b = self.form.blocks
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.q_blocks * b.q - x.shape[2])))
        x = x.reshape(*x.shape[:2], self.q_blocks, b.q // b.tile_q, 1, b.tile_q)
        x = jnp.broadcast_to(x, (*x.shape[:4], b.heads, b.tile_q))
        return x.swapaxes(1, 2).reshape(x.shape[0], self.q_blocks, x.shape[1], -1)

    def outputs(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        form, b = self.form, self.form.blocks
        shape, block = (form.rules.queries, form.value_dim), (b.q, form.value_dim)
        if form.out_minor:
            shape, block = shape[::-1], block[::-1]
        out = jax.ShapeDtypeStruct((self.batch, self.heads, *shape), form.dtype)
        across = self.heads // b.heads
        lse = jax.ShapeDtypeStruct((self.batch, across, self.q_blocks, 1, form.columns), jnp.float32)
        place = (lambda r, h, i, j: (r, h, 0, i)) if form.out_minor else (lambda r, h, i, j: (r, h, i, 0))
        return (out, ((1, b.heads, *block), place)), (
            lse,
            ((1, 1, 1, 1, form.columns), lambda r, h, i, j: (r, h, i, 0, 0)),
        )

    def results(self, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        form, b = self.form, self.form.blocks
        lse = lse.reshape(self.batch, -1, self.q_blocks, b.q // b.tile_q, b.heads, b.tile_q)
        lse = jnp.moveaxis(lse, 4, 2).reshape(self.batch, self.heads, -1)[:, :, : form.rules.queries]
        return out.swapaxes(2, 3) if form.out_minor else out, lse

    def scratch(self) -> list[Any]:
        form, b = self.form, self.form.blocks
        columns = form.columns
        return [
            pltpu.VMEM((form.dim, columns) if form.q_minor else (columns, form.dim), form.dtype),
            *([pltpu.VMEM((b.kv, form.dim), form.dtype)] if form.k_minor else []),
            pltpu.VMEM((form.value_dim + form.ones, b.kv), form.dtype),
            pltpu.VMEM((8, columns), jnp.float32),
            pltpu.VMEM((8, columns), jnp.float32),
            pltpu.VMEM((form.value_dim, columns), jnp.float32),
        ]

    def scratch_names(self, refs: list[Any]) -> dict[str, Any]:
        names = ["scaled", *(["keys"] if self.form.k_minor else []), "values", "peak", "total", "acc"]
        return {"keys": None} | dict(zip(names, refs, strict=True))
