"""JAX's kernels for decoding over paged caches, at the page and block sizes found best on v5e and v6e.

JAX ships none over dense caches; these read the same live tokens from pages of 64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_decode.cases import Case
from pallas_kernels.named import Call

PAGE = 64
PAGED = (8, 16, 32)  # pages of a block
RAGGED = ((8, 8), (16, 8), (16, 32), (32, 32))  # pages of a block, queries of a block
FITS = 12e9  # bytes of pages


def peer(case: Case) -> list[tuple[str, Call]]:
    plain = case.queries == 1 and case.dtype == case.cache == "bfloat16" and not case.shared
    unknown = set(case.arrays) | (set(case.options) - {"ring", "window"})
    if not plain or unknown or case.head_dim % 128 or case.head_dim != case.value_dim:
        return []
    context = max(case.lengths)
    pages = case.batch * -(-context // PAGE)
    if 4 * pages * PAGE * case.kv_heads * case.head_dim > FITS:
        return []
    found = [(f"ragged_paged_attention {n}x{PAGE}, q {q}", _ragged(case, pages, n, q)) for n, q in RAGGED]
    if "window" not in case.options:
        found += [(f"paged_attention {n}x{PAGE}", _paged(case, pages, n)) for n in PAGED if context >= n * PAGE]
    return found


def _tables(case: Case, pages: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array(case.lengths, np.int32)
    return lengths, np.arange(pages, dtype=np.int32).reshape(case.batch, -1)


def _paged(case: Case, pages: int, block: int) -> Call:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    lengths, table = _tables(case, pages)
    kv = jax.ShapeDtypeStruct((case.kv_heads, pages, PAGE, case.head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((case.batch, case.heads, case.head_dim), jnp.bfloat16)

    def fn(q, k, v, lengths, table):
        return paged_attention(q, k, v, lengths, table, pages_per_compute_block=block)

    return Call(fn, (q, kv, kv, lengths, table), case.work)


def _ragged(case: Case, pages: int, block: int, queries: int) -> Call:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    lengths, table = _tables(case, pages)
    q = jax.ShapeDtypeStruct((case.batch, case.heads, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((pages, PAGE, 2 * case.kv_heads, case.head_dim), jnp.bfloat16)
    starts = np.arange(case.batch + 1, dtype=np.int32)

    def fn(q, kv, lengths, table, starts, rows):
        return ragged_paged_attention(
            q,
            kv,
            lengths,
            table,
            starts,
            rows,
            sm_scale=case.head_dim**-0.5,
            sliding_window=case.options.get("window"),
            num_kv_pages_per_block=block,
            num_queries_per_block=queries,
        )

    return Call(fn, (q, kv, lengths, table, starts, np.array([case.batch], np.int32)), case.work)
