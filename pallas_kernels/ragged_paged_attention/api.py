"""Attention over a paged cache, prefill chunks and decode rows mixed in one call."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tuned
from pallas_kernels.dispatch import Implementation, check_implementation, dispatch
from pallas_kernels.ragged_paged_attention import blocks as block_sizes
from pallas_kernels.ragged_paged_attention.blocks import Blocks
from pallas_kernels.ragged_paged_attention.kernel import pallas, unsupported
from pallas_kernels.ragged_paged_attention.pages import check_pages, check_rows
from pallas_kernels.ragged_paged_attention.reference import Arrays, reference
from pallas_kernels.ragged_paged_attention.xla import xla
from pallas_kernels.validate import (
    FLOATS,
    ancestors,
    check_dtype,
    check_heads,
    check_shape,
    per_head,
    positive,
    window_sides,
)


@overload
def ragged_paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_starts: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    page_scales: jax.Array | None = None,
    value_dim: int | None = None,
    latent: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def ragged_paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_starts: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    page_scales: jax.Array | None = None,
    value_dim: int | None = None,
    latent: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def ragged_paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_starts: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    page_scales: jax.Array | None = None,
    value_dim: int | None = None,
    latent: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    ancestor_mask: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
):
    """Causal attention of each row's newest tokens over its pages, which already hold them.

    Row r has the query tokens q_starts[r]..q_starts[r+1]-1, the last of its kv_lengths[r] tokens: one when it
    decodes, a few when it verifies drafted tokens, many when it reads a chunk of a prompt. Rows may share pages.

    Args:
      q: [tokens, N, D], float32, bfloat16 or float16. Tokens of no row may be anything.
      pages: [P, K, page, W], or stacked [L, P, K, page, W] with `layer`: of each token and key head the key, then,
        at the end of the row, the value (see `pages.py`, `page_width`). N a multiple of K. float32, bfloat16,
        float16, int8, float8, or uint16 for the bits of bfloat16, the form to choose on a CPU.
      page_table: int32 [rows, pages_per_row], the pages of each row in the order of its tokens. Entries that no
        query needs may be anything; under `jit`, ids out of range mean some page in range.
      kv_lengths: int32 [rows], tokens of each row, the new ones included, 0..pages_per_row * page. Under `jit`,
        tokens beyond the table do not exist. Fewer than the new tokens: the first of these are before the text
        and see nothing.
      q_starts: int32 [rows + 1], not falling. Rows without tokens cost nothing: pad with equal numbers.
      layer: which layer of stacked pages, 0..L-1; may be traced (out of range then means the nearest layer).
      page_scales: float32 [P, 1, 2 * K * page], or with L before; k stands for k * scale (see `pages.py`). int8
        pages need them.
      value_dim: Dv; default D.
      latent: a token's value is the first Dv numbers of its key, W >= D (multi-head latent attention with the
        up-projections absorbed; DeepSeek-AI 2024, arXiv:2405.04434); page_scales then are [P, 1, K * page].
      window, softcap, sinks, alibi_slopes, scale: as for `flash_attention`.
      ancestor_mask: bool [T, T] or [rows, T, T]: the new tokens of rows that have at most T are a tree, as for
        `flash_attention`; longer rows are chains.
      return_lse: also return the log-sum-exp of the scores, sinks included.
      blocks: sizes that the kernel works in; by default from the tuned tables, else by a rule.
      implementation: "reference", "xla", "pallas" or "interpret"; None takes the kernel on TPUs, where there is
        one for the call, and the XLA form elsewhere.

    Returns:
      out [tokens, N, Dv] in q's dtype, and, if asked for, lse float32 [tokens, N]. A query that sees no key, and a
      token of no row, give 0 and -inf (a query with sinks: 0 and the sink). Pages and slots that no query of a row
      sees may hold NaN. Not differentiable.

    Raises:
      InputError: shapes, dtypes or values that do not fit, the argument named.
      UnsupportedError: the kernel was asked for by name and cannot do this call; says why.
    """
    check_implementation(implementation)
    check_dtype("q", q, FLOATS)
    check_shape("q", q, (None, None, None), "tokens, N, D")
    tokens, heads, dim = q.shape
    stacked, layer, values = check_pages(pages, page_scales, layer, dim, value_dim, latent)
    check_heads(heads, pages.shape[-3])
    left, right = window_sides(window)
    page_table, kv_lengths, q_starts = check_rows(
        page_table, kv_lengths, q_starts, tokens, pages.shape[-2], pages.shape[-4], left
    )
    rows, per_row = page_table.shape
    tree = None
    if ancestor_mask is not None:
        tree = ancestors("ancestor_mask", ancestor_mask, rows, ancestor_mask.shape[-1])
    arrays = Arrays(
        q,
        pages if stacked else pages[None],
        page_scales if page_scales is None or stacked else page_scales[None],
        page_table,
        kv_lengths,
        q_starts,
        layer,
        None if sinks is None else per_head("sinks", sinks, heads),
        None if alibi_slopes is None else per_head("alibi_slopes", alibi_slopes, heads),
        tree,
    )
    scale = positive("scale", dim**-0.5 if scale is None else scale)
    options: dict[str, Any] = dict(
        value_dim=values, latent=latent, scale=scale, softcap=positive("softcap", softcap), left=left, right=right
    )
    if 0 in (*q.shape, rows, per_row) or (tree is not None and 0 in tree.shape):
        out, lse = jnp.zeros((tokens, heads, values), q.dtype), jnp.full((tokens, heads), -jnp.inf)
        return (out, lse) if return_lse else out
    reasons = unsupported(arrays)

    def kernel(arrays: Arrays, *, interpret: bool):
        problem = block_sizes.problem(arrays, value_dim=values, latent=latent, return_lse=return_lse)
        sizes = tuned.choose("ragged_paged_attention", block_sizes, problem, chips.current(), blocks)
        return pallas(arrays, return_lse=return_lse, blocks=sizes, interpret=interpret, **options)

    def asked(results):
        return results if return_lse else results[0]

    return dispatch(
        "ragged_paged_attention",
        implementation,
        arrays,
        reference=lambda arrays: asked(reference(arrays, **options)),
        xla=lambda arrays: asked(xla(arrays, **options, blocks=blocks)),
        pallas=lambda arrays, *, interpret: asked(kernel(arrays, interpret=interpret)),
        unsupported=reasons,
    )
