"""JAX's kernels over paged caches, at the block sizes found best on v5e and v6e.

Both copy page by page. `paged_attention` serves rows of one token; K and V of a head are apart, a copy each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.named import Call
from pallas_kernels.ragged_paged_attention.cases import Case

KEYS = (512, 1024, 2048)  # of a block
QUERIES = (8, 32, 128)  # of a block of the ragged kernel
FITS = 12e9  # bytes of pages


def peer(case: Case) -> list[tuple[str, Call]]:
    plain = case.dtype == case.cache == "bfloat16" and not case.latent and not case.arrays
    if not plain or set(case.options) - {"window"} or case.head_dim % 128 or case.head_dim != case.value_dim:
        return []
    count = int(case.page_counts.sum())
    if 4 * count * case.page * case.kv_heads * case.head_dim > FITS:
        return []
    tokens, context = int(case.q_starts[-1]), int(case.kv_lengths.max())
    found = []
    for keys in KEYS:
        pages = keys // case.page
        if pages < 1 or keys > context:
            continue
        for queries in QUERIES:
            if queries <= max(8, tokens):
                name = f"ragged_paged_attention {pages}x{case.page}, q {queries}"
                found.append((name, _ragged(case, count, pages, queries)))
        if all(new == 1 for _, new in case.rows) and not case.options and case.page_table().shape[1] % pages == 0:
            found.append((f"paged_attention {pages}x{case.page}", _paged(case, count, pages)))
    return found


def _ragged(case: Case, count: int, pages: int, queries: int) -> Call:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def fn(*arrays: Any):
        return ragged_paged_attention(
            *arrays,
            sm_scale=case.head_dim**-0.5,
            sliding_window=case.options.get("window"),
            num_kv_pages_per_block=pages,
            num_queries_per_block=queries,
            vmem_limit_bytes=64 << 20,
        )

    q = jax.ShapeDtypeStruct((int(case.q_starts[-1]), case.heads, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((count, case.page, 2 * case.kv_heads, case.head_dim), jnp.bfloat16)
    rows = np.array([len(case.rows)], np.int32)
    return Call(fn, (q, kv, case.kv_lengths, case.page_table(), case.q_starts, rows), case.work)


def _paged(case: Case, count: int, pages: int) -> Call:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    def fn(*arrays: Any):
        return paged_attention(*arrays, pages_per_compute_block=pages)

    q = jax.ShapeDtypeStruct((len(case.rows), case.heads, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((case.kv_heads, count, case.page, case.head_dim), jnp.bfloat16)
    return Call(fn, (q, kv, kv, case.kv_lengths, case.page_table()), case.work)
