"""`ragged_paged_attention` on a TPU: how the kernel is called. Its parts: `walk` (which pages, copied when) and
`attend` (what is computed with them).

The grid is over windows of `q` tokens. Within a window the rows that have tokens there are visited in order, and
of each row the pages that those tokens may see, a block of pages at a time. Copies run ahead of the blocks, across
rows and windows, so that the memory never waits for a row to end.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import InputError
from pallas_kernels.ragged_paged_attention.attend import Attend, State
from pallas_kernels.ragged_paged_attention.blocks import Blocks, problem, refusals, vmem_bytes
from pallas_kernels.ragged_paged_attention.pages import LANES
from pallas_kernels.ragged_paged_attention.reference import Arrays
from pallas_kernels.ragged_paged_attention.walk import Walk
from pallas_kernels.stacks import in_hbm

LOG2E = math.log2(math.e)
# Page ids are read by the scalar core: they must lie in its memory, 1 MiB on every chip, beside the rest.
TABLE_BYTES = 768 * 1024
DTYPES = (jnp.float32, jnp.bfloat16)
CACHES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def unsupported(arrays: Arrays) -> list[str]:
    """Why the kernel cannot do a call; empty where it can."""
    reasons = []
    if not any(arrays.q.dtype == d for d in DTYPES):
        reasons.append(f"q is {arrays.q.dtype.name}, not float32 or bfloat16")
    if not any(arrays.pages.dtype == d for d in CACHES):
        reasons.append(f"the pages are {arrays.pages.dtype.name}")
    page, width = arrays.pages.shape[-2:]
    if page % 16 or (page % LANES and LANES % page):
        reasons.append(f"a page has {page} tokens, not 16, 32, 64 or a multiple of 128")
    if width % LANES:
        reasons.append(f"the pages' rows are {width} wide, not a multiple of {LANES} (see page_width)")
    if arrays.page_table.size * 4 > TABLE_BYTES:
        reasons.append(f"page_table has {arrays.page_table.size} entries, more than {TABLE_BYTES // 4}")
    if arrays.ancestors is not None:
        reasons.append("there is an ancestor_mask")
    return reasons


def pallas(
    arrays: Arrays,
    *,
    value_dim: int,
    latent: bool,
    scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    return_lse: bool,
    blocks: Blocks,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The same maths, arguments and results as the reference; lse is None unless asked for."""
    del right  # Causality hides what is right of a query.
    facts = problem(arrays, value_dim=value_dim, latent=latent, return_lse=return_lse)
    if wrong := refusals(facts, blocks):
        raise InputError(f"blocks={blocks} for pages of {facts.page} tokens: {'; '.join(wrong)}.")
    tokens, heads, dim = arrays.q.shape
    groups, page, width = arrays.pages.shape[-3:]
    share = heads // groups
    size = blocks.pages * page
    tiles = blocks.q // blocks.q_tile
    rows = share * blocks.q_tile
    windows = pl.cdiv(tokens, blocks.q)
    scaled = arrays.page_scales is not None

    def columns(x: jax.Array | None) -> list[jax.Array]:
        """One number a head as [K, N / K, 128], to be added to rows of scores."""
        return [] if x is None else [jnp.tile(LOG2E * x.reshape(groups, share, 1), (1, 1, LANES))]

    vectors = [*columns(arrays.sinks), *columns(arrays.alibi_slopes)]
    head_block = pl.BlockSpec((groups, share, LANES), lambda i, *_: (0, 0, 0))
    window_block = lambda lanes: pl.BlockSpec((blocks.q, heads, lanes), lambda i, *_: (i, 0, 0))  # noqa: E731
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    outs = [jax.ShapeDtypeStruct((tokens, heads, value_dim), arrays.q.dtype)]
    if return_lse:
        outs.append(jax.ShapeDtypeStruct((tokens, heads, LANES), jnp.float32))
    scratch = dict(
        pages=pltpu.VMEM((blocks.buffers, blocks.pages, groups, page, width), arrays.pages.dtype),
        arrived=pltpu.SemaphoreType.DMA((blocks.buffers,)),
        ahead=pltpu.SMEM((8,), jnp.int32),
        single=State.scratch((groups, share), facts),
        tile=State.scratch((tiles, groups, rows), facts),
        wide=pltpu.VMEM((blocks.q_tile, heads, max(facts.key_lanes, facts.value_lanes)), jnp.float32),
    )
    if arrays.page_scales is not None:
        count = arrays.page_scales.shape[-1]
        scratch |= dict(
            page_scales=pltpu.VMEM((blocks.buffers, blocks.pages, 1, count), jnp.float32),
            scales=pltpu.VMEM((count // page, size // LANES, LANES), jnp.float32),
        )

    def body(starts, lengths, table, layer, q, pages, *refs):
        refs = list(refs)
        page_scales = refs.pop(0) if scaled else None
        sinks = refs.pop(0) if arrays.sinks is not None else None
        slopes = refs.pop(0) if arrays.alibi_slopes is not None else None
        out = refs.pop(0)
        lse = refs.pop(0) if return_lse else None
        own = refs.pop(0)
        walk = Walk(
            starts=starts,
            lengths=lengths,
            table=table,
            pages=pages.at[layer[0]],
            page_scales=page_scales.at[layer[0]] if page_scales is not None else None,
            buffer=own["pages"],
            scale_buffer=own.get("page_scales"),
            arrived=own["arrived"],
            ahead=own["ahead"],
            window=blocks.q,
            left=left,
            run=blocks.run,
        )
        attend = Attend(
            facts=facts,
            blocks=blocks,
            scale=scale,
            softcap=softcap,
            left=left,
            q=q,
            out=out,
            lse=lse,
            sinks=sinks,
            slopes=slopes,
            scales=own.get("scales"),
            wide=own["wide"],
            single=own["single"],
            tile=own["tile"],
        )
        walk.window_of(pl.program_id(0), attend)

    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(windows,),
            in_specs=[
                window_block(dim),
                in_place,
                *([in_place] if scaled else []),
                *([head_block] * len(vectors)),
            ],
            out_specs=[window_block(value_dim), *([window_block(LANES)] if return_lse else [])],
            scratch_shapes=[scratch],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_bytes(facts, blocks) + (16 << 20),
            disable_bounds_checks=True,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="ragged_paged_attention",
    )
    results = call(
        arrays.q_starts,
        arrays.kv_lengths,
        arrays.page_table.reshape(-1),
        arrays.layer.reshape(1),
        arrays.q,
        in_hbm(arrays.pages, interpret),
        *([in_hbm(arrays.page_scales, interpret)] if arrays.page_scales is not None else []),
        *vectors,
    )
    return results[0], results[1][..., 0] if return_lse else None
