"""The contract of `ragged_paged_attention`: every implementation against the rules."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import chips, tuned
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.ragged_paged_attention import Blocks, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.blocks import Problem, heuristic, refusals, vmem_bytes
from pallas_kernels.ragged_paged_attention.cases import MODELS, SMALL, Case
from pallas_kernels.stored import to_bits

CASES = {case.name: case for case in SMALL}
QUICK = {
    "mixed",
    "nothing_read",
    "window",
    "softcap_sinks_alibi",
    "latent_int8",
    "bfloat16",
}  # the rest takes a minute
SMALL_BLOCKS = Blocks(8, 5, 1)


def variants():
    for case in SMALL:
        slow = [] if case.name in QUICK else [pytest.mark.slow]
        yield pytest.param(case, "reference", None, id=f"{case.name}-reference")
        yield pytest.param(case, "xla", None, id=f"{case.name}-xla")
        yield pytest.param(case, "xla", SMALL_BLOCKS, id=f"{case.name}-xla-small", marks=slow)
        if case.cache != "uint16" and not case.tree:
            yield pytest.param(case, "interpret", None, id=f"{case.name}-interpret", marks=slow)


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


def close(found, wanted, tolerance):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(found[~finite], wanted[~finite])
    scale = max(1.0, np.abs(wanted[finite]).max(initial=0))
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=tolerance, atol=tolerance * scale)


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


@pytest.mark.parametrize(("case", "implementation", "blocks"), list(variants()))
def test_contract(case, implementation, blocks):
    check(case, implementation, blocks, prepared(case.name))


ROWS, TOKENS, PAGES, PAGE = 3, 12, 3, 16


@functools.cache
def ragged(implementation):
    @jax.jit
    def run(q, pages, table, lengths, starts):
        return ragged_paged_attention(
            q, pages, table, lengths, starts, window=20, return_lse=True, implementation=implementation
        )

    return run


def any_rows(implementation, counts, lengths, seed):
    counts = [min(n, TOKENS // ROWS) if sum(counts) > TOKENS else n for n in counts]
    rows = tuple(zip(lengths, counts, strict=True))
    spare = TOKENS - sum(counts)
    case = Case("any", 4, 2, 64, 64, PAGE, rows, spare=spare, options={"window": 20})
    (q, pages, table, lengths, starts), *_, out, lse = prepare(case, seed)
    full = np.full((ROWS * PAGES + 2, *pages.shape[1:]), np.nan, np.float32)
    full[: len(pages)] = pages
    table = np.pad(table, ((0, 0), (0, PAGES - table.shape[1])), constant_values=-5)
    got_out, got_lse = ragged(implementation)(q, full, table, lengths, starts)
    close(got_out, out, 3e-6)
    close(got_lse, lse, 3e-6)


counts = st.lists(st.integers(0, TOKENS), min_size=ROWS, max_size=ROWS)
lengths = st.lists(st.integers(0, PAGES * PAGE), min_size=ROWS, max_size=ROWS)


@given(counts, lengths, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_rows_xla(counts, lengths, seed):
    any_rows("xla", counts, lengths, seed)


@given(counts, lengths, st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_rows_kernel(counts, lengths, seed):
    any_rows("interpret", counts, lengths, seed)


def test_layer_may_be_traced_and_out_of_range():
    case = CASES["decode"]
    arguments, layer, arrays, *_ = prepared("decode")
    run = jax.jit(lambda layer: ragged_paged_attention(*arguments, layer=layer, **case.static, **arrays))
    np.testing.assert_array_equal(run(layer), run(layer + 7))


def test_blocks_of_every_size():
    """Pages by one copy and one by one, three buffers, parts smaller than a block, tiles that pass the window."""
    case = CASES["many_windows"]
    check(case, "interpret", Blocks(16, 8, 16, 128, 256, 3, 2), prepare(case, 3))


def test_a_tpu_gets_the_kernel():
    text = str(jax.make_jaxpr(lambda given: ragged_paged_attention(**given))(arguments()))
    assert "platform_index" in text
    assert "pallas_call" in text


def test_memory_is_linear_in_the_tokens():
    def temporaries(tokens):
        shapes = (tokens, 2, 64), (tokens // 64, 1, 64, 128)
        q, pages = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        table = np.arange(tokens // 64)[None]
        starts = np.array([0, tokens])
        run = jax.jit(lambda q, pages: ragged_paged_attention(q, pages, table, np.array([tokens]), starts))
        return run.lower(q, pages).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(8192), temporaries(32768)
    assert large < 4.5 * small
    assert large < 3 * 4 * 32768 * 2 * 64


def arguments(**changes):
    """A call that is right, then changed."""
    given = dict(
        q=jnp.zeros((6, 4, 64)),
        pages=jnp.zeros((5, 2, 16, 128)),
        page_table=np.array([[0, 1], [2, 3]]),
        kv_lengths=np.array([20, 31]),
        q_starts=np.array([0, 1, 6]),
    )
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(page_table=np.array([[0, 1], [2, 5]])), r"page_table\[1, 1\]=5, but 0..4 is allowed"),
        (dict(page_table=np.array([[-1, 1], [2, 3]])), r"page_table\[0, 0\]=-1"),
        (dict(kv_lengths=np.array([33, 31])), r"kv_lengths=\[33, 31\], but 0..32 is allowed"),
        (dict(kv_lengths=np.array([20, -1])), "kv_lengths=.*0..32"),
        (dict(kv_lengths=np.array([20.0, 3.0])), "kv_lengths.dtype=float.*integer"),
        (dict(q_starts=np.array([0, 3, 2])), r"q_starts=\[0, 3, 2\], but it must not fall"),
        (dict(q_starts=np.array([0, 3, 7])), "q_starts=.*0..6 is allowed: q has 6 tokens"),
        (dict(q_starts=np.array([0, 6])), "q_starts.shape"),
        (dict(q=jnp.zeros((6, 3, 64))), "q has 3 heads and k has 2"),
        (dict(q=jnp.zeros((6, 4, 65))), "last axis must hold 130, a key of 65 and a value of 65"),
        (dict(value_dim=0), "value of 0"),
        (dict(latent=True, value_dim=65), "value_dim=65 and D=64"),
        (dict(pages=jnp.zeros((5, 2, 16))), "pages are"),
        (dict(pages=jnp.zeros((2, 5, 2, 16, 128))), r"needs layer=0..1"),
        (dict(layer=0), "takes no layer"),
        (dict(pages=jnp.zeros((2, 5, 2, 16, 128)), layer=2), "layer=2"),
        (dict(pages=jnp.zeros((5, 2, 16, 128), jnp.int8)), "int8 and have no scales"),
        (dict(page_scales=jnp.zeros((5, 1, 32))), "page_scales.shape"),
        (dict(window=0), "window=0"),
        (dict(softcap=-1.0), "softcap=-1.0"),
        (dict(sinks=jnp.zeros(3)), "sinks.shape"),
        (dict(ancestor_mask=jnp.zeros((3, 2), bool)), "ancestor_mask.shape"),
        (dict(implementation="mosaic"), "implementation='mosaic'"),
        (dict(implementation="interpret", blocks=Blocks(8, 8, 8, 96, 128)), "keys=96, which must divide 128"),
        (dict(implementation="interpret", blocks=Blocks(8, 5, 8, 128, 128)), "q_tile=5"),
        (dict(implementation="interpret", blocks=Blocks(8, 8, 1 << 16, 128, 128)), "need .* MiB of VMEM"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        ragged_paged_attention(**arguments(**changes))


def test_unused_entries_may_be_anything():
    table = np.array([[0, 1], [2, 99]])
    ragged_paged_attention(**arguments(page_table=table, kv_lengths=np.array([20, 16])))
    table = np.array([[-1, 1], [2, 99]])
    ragged_paged_attention(**arguments(page_table=table, kv_lengths=np.array([32, 16]), window=3))


def test_every_reason_against_the_kernel():
    given = arguments(q=jnp.zeros((6, 4, 16), jnp.float16), pages=jnp.zeros((5, 2, 24, 40), jnp.uint16))
    mask = jnp.ones((2, 2), bool)
    with pytest.raises(UnsupportedError, match=r"float16.*uint16.*24 tokens.*40 wide.*ancestor_mask"):
        ragged_paged_attention(**given, ancestor_mask=mask, implementation="pallas")


@pytest.mark.parametrize("chip", list(chips.CHIPS.values()), ids=lambda chip: chip.name)
def test_rule_fits_and_works(chip):
    for case in MODELS:
        shape = Problem(
            *(case.shapes[0][0], case.heads, case.kv_heads, case.head_dim, case.value_dim, len(case.rows)),
            *(case.page_table().shape[1], case.page, case.page_width, case.dtype, case.cache, case.latent),
            *(case.cache == "int8", False),
        )
        blocks = heuristic(shape, chip)
        assert refusals(shape, blocks) == []
        assert vmem_bytes(shape, blocks) <= tuned.budget(chip)
