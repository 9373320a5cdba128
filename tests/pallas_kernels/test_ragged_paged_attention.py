"""The contract of `ragged_paged_attention`: every implementation against the rules."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import Blocks, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cases import SMALL
from pallas_kernels.stored import to_bits

CASES = {case.name: case for case in SMALL}
VARIANTS = [
    (case, implementation, blocks)
    for case in SMALL
    for implementation, blocks in (("reference", None), ("xla", None), ("xla", Blocks(8, 5, 1)))
]


def stored(x, dtype):
    """float values, nan among them, as pages of `dtype`; int8 has no nan."""
    if dtype == "int8":
        return jnp.asarray(np.nan_to_num(x, nan=127), dtype)
    return to_bits(jnp.asarray(x, jnp.bfloat16)) if dtype == "uint16" else jnp.asarray(x, dtype)


def rounded(x, dtype):
    """x with the values that pages of `dtype` can hold."""
    return np.array(jnp.asarray(x, "bfloat16" if dtype == "uint16" else dtype), np.float32)


def answer(case, q, pages, table, arrays):
    """By the rules, one row at a time: out [tokens, N, Dv], lse [tokens, N], slots used bool [P, K, page]."""
    out = np.zeros((q.shape[0], case.heads, case.value_dim))
    lse = np.full((q.shape[0], case.heads), -np.inf)
    used = np.zeros(pages.shape[:3], bool)
    scales = arrays.get("page_scales")
    for row, ((length, new), start) in enumerate(zip(case.rows, case.q_starts[:-1], strict=True)):
        if not new:
            continue
        ids = table[row, : case.page_counts[row]]

        def gather(x, ids=ids):  # [P, K, page, ...] -> [1, K, S, ...]
            return np.moveaxis(x[ids], 0, 1).reshape(1, case.kv_heads, len(ids) * case.page, *x.shape[3:])

        k = gather(pages[..., : case.head_dim])
        v = gather(pages[..., : case.value_dim] if case.latent else pages[..., pages.shape[-1] - case.value_dim :])
        options = dict(case.options) | {
            n: x for n, x in arrays.items() if n not in ("page_scales", "ancestor_mask")
        }
        if scales is not None:
            parts = scales.reshape(len(scales), -1, case.kv_heads, case.page)
            options |= {"k_scale": gather(parts[:, 0]), "v_scale": gather(parts[:, -1])}
        if "ancestor_mask" in arrays and new <= case.tree:
            options["ancestor_mask"] = arrays["ancestor_mask"][row, :new, :new]
        each, each_lse, seen = oracle.decode(
            np.moveaxis(q[None, start : start + new], 1, 2), k, v, np.array([length]), **options
        )
        out[start : start + new] = each[0].swapaxes(0, 1)
        lse[start : start + new] = each_lse[0].T
        if len(ids):
            mine = oracle.used_keys(seen, case.kv_heads).reshape(case.kv_heads, len(ids), case.page)
            used[ids] |= np.moveaxis(mine, 1, 0)
    return out, lse, used


def prepare(case, seed=0):
    """Arguments with nan in all that nothing may read, and the rules' answer for the last layer."""
    q, pages, arrays = case.inputs(seed)
    q, pages = rounded(q, case.dtype), rounded(pages, case.cache)
    table = case.page_table(junk=10**6)
    layer = None if case.layers is None else case.layers - 1

    def one(x):
        return x if layer is None else x[layer]

    own = arrays | ({"page_scales": one(arrays["page_scales"])} if "page_scales" in arrays else {})
    out, lse, used = answer(case, q, one(pages), table, own)
    if layer is not None:
        used = np.stack([used if i == layer else np.zeros_like(used) for i in range(case.layers)])
    if "page_scales" in arrays:
        parts = arrays["page_scales"].reshape(*used.shape[:-2], -1, *used.shape[-2:])
        parts = np.where(used[..., None, :, :], parts, np.nan).astype(np.float32)
        arrays["page_scales"] = parts.reshape(arrays["page_scales"].shape)
    q[case.q_starts[-1] :] = np.nan
    q[~np.isfinite(lse).all(1) & (out == 0).all((1, 2))] = np.nan
    middle = slice(case.head_dim, None if case.latent else pages.shape[-1] - case.value_dim)
    pages[..., middle] = 0
    pages = stored(oracle.poisoned(pages, used), case.cache)
    arguments = (jnp.asarray(q, case.dtype), pages, table, case.kv_lengths, case.q_starts)
    return arguments, layer, arrays, out, lse


prepared = functools.cache(lambda name: prepare(CASES[name]))


def close(given, wanted, tolerance):
    given, wanted = np.asarray(given, np.float64), np.asarray(wanted)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(given[~finite], wanted[~finite])
    scale = max(1.0, np.abs(wanted[finite]).max(initial=0))
    np.testing.assert_allclose(given[finite], wanted[finite], rtol=tolerance, atol=tolerance * scale)


def check(case, implementation, blocks, prepared):
    arguments, layer, arrays, want_out, want_lse = prepared
    run = jax.jit(
        lambda arguments, arrays: ragged_paged_attention(
            *arguments,
            layer=layer,
            **case.static,
            **arrays,
            return_lse=True,
            implementation=implementation,
            blocks=blocks,
        )
    )
    out, lse = run(arguments, arrays)
    assert out.dtype == case.dtype
    assert lse.dtype == jnp.float32
    close(out, want_out, 1e-2 if case.dtype == "bfloat16" else 3e-6)
    close(lse, want_lse, 1e-2 if case.dtype == "bfloat16" else 3e-6)


@pytest.mark.parametrize(
    ("case", "implementation", "blocks"),
    VARIANTS,
    ids=[f"{case.name}-{implementation}{'-small' if blocks else ''}" for case, implementation, blocks in VARIANTS],
)
def test_contract(case, implementation, blocks):
    check(case, implementation, blocks, prepared(case.name))
