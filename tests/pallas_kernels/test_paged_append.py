"""The contract of `paged_append`: every implementation against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import InputError
from pallas_kernels.paged_append import paged_append
from pallas_kernels.ragged_paged_attention import empty_pages
from pallas_kernels.stored import decode, to_bits

ROWS = ((17, 1), (40, 23), (0, 0), (33, 33), (3, 5), (80, 2))  # (kv_length, new tokens)
TABLE = np.array(
    [[4, 9, 99, -1, 0], [1, 0, 7, 0, 0], [0] * 5, [3, 5, 2, 0, 0], [8, -1, -1, -1, -1], [-1, -1, -1, -1, 6]],
    np.int32,
)
SPARE = 3


def expected(pages, scales, k, v, layer, page):
    """Where each token goes, one at a time."""
    pages, scales = pages.copy(), None if scales is None else scales.copy()
    token = 0
    for (length, new), ids in zip(ROWS, TABLE, strict=True):
        for position in range(length - new, length):
            if position >= 0 and ids[position // page] >= 0:
                at = (layer, ids[position // page], slice(None), position % page)
                row = np.zeros(pages[at].shape, np.float64)
                for side, x in enumerate([k] if v is None else [k, v]):
                    x = x[token].astype(np.float64)
                    if scales is not None:
                        scale = np.abs(x).max(-1) / 127
                        heads = np.arange(k.shape[1]) + side * k.shape[1]
                        scales[layer, ids[position // page], 0, heads * page + position % page] = scale
                        x = x / scale[:, None]
                    row[:, slice(0, x.shape[-1]) if side == 0 else slice(row.shape[-1] - x.shape[-1], None)] = x
                pages[at] = row
            token += 1
    return pages, scales


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize(
    ("dtype", "page", "heads", "latent"),
    [
        ("float32", 16, 2, False),
        ("bfloat16", 16, 3, False),
        ("uint16", 16, 2, False),
        ("int8", 32, 2, False),
        ("int8", 32, 1, True),
        ("float8_e4m3fn", 32, 1, False),
    ],
)
def test_contract(implementation, dtype, page, heads, latent):
    if dtype == "uint16" and implementation == "interpret":
        pytest.skip("a CPU's form of bfloat16")
    random = np.random.default_rng(0)
    tokens = sum(new for _, new in ROWS) + SPARE
    k, v = (random.normal(size=(tokens, heads, n)).astype(np.float32) for n in (96, 96))
    v = None if latent else v
    pages, scales = empty_pages(10, heads, page, 128 if latent else 256, dtype, layers=2, latent=latent)
    if dtype != "int8":
        scales = None
    before = np.asarray(random.integers(-9, 9, pages.shape), np.float32)
    pages = to_bits(jnp.asarray(before, "bfloat16")) if dtype == "uint16" else jnp.asarray(before, dtype)
    starts = np.cumsum([0, *(new for _, new in ROWS)])
    lengths = np.array([length for length, _ in ROWS])
    run = jax.jit(
        lambda pages, scales, k, v: paged_append(
            pages, k, v, TABLE, lengths, starts, layer=1, page_scales=scales, implementation=implementation
        )
    )
    out, out_scales = run(pages, scales, k, v)
    stored = "bfloat16" if dtype == "uint16" else dtype
    k, v = (
        None if x is None else np.asarray(jnp.asarray(x, stored if dtype != "int8" else "float32"), np.float32)
        for x in (k, v)
    )
    want, want_scales = expected(before, None if scales is None else np.asarray(scales), k, v, 1, page)
    assert out.dtype == pages.dtype
    np.testing.assert_allclose(decode(out), want, atol=0.5001 if dtype == "int8" else 0)
    assert (out_scales is None) == (scales is None)
    if scales is not None:
        np.testing.assert_allclose(out_scales, want_scales, rtol=1e-6)


def test_a_tpu_gets_the_kernel():
    pages, _ = empty_pages(10, 2, 16, 256, "bfloat16")
    k = jnp.zeros((3, 2, 128), "bfloat16")
    run = jax.jit(lambda pages, k: paged_append(pages, k, k, TABLE[:1], np.array([17]), np.array([0, 3])))
    assert "tpu_custom_call" in run.trace(pages, k).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="XLA's CPU compiler of JAX 0.8 copies the pages at each write"
)
def test_in_place():
    """A loop over layers updates donated pages without copying them."""

    def run(pages, k, lengths):
        def layer(index, pages):
            return paged_append(pages, k, k, TABLE[:1], lengths, np.array([0, 3]), layer=index)[0]

        return jax.lax.fori_loop(0, 2, layer, pages)

    for dtype in ("float32", "uint16"):
        pages, _ = empty_pages(200, 2, 16, 256, dtype, layers=2)
        compiled = jax.jit(run, donate_argnums=0).lower(pages, jnp.zeros((3, 2, 128)), np.array([17])).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes / 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(v=jnp.zeros((3, 2, 129))), "last axis must hold 257"),
        (dict(v=jnp.zeros((2, 2, 128))), "v.shape"),
        (dict(v=jnp.zeros((3, 2, 128), "bfloat16")), "dtypes float32 and bfloat16"),
        (dict(k=jnp.zeros((3, 1, 128))), "k.shape"),
        (dict(k=jnp.zeros((3, 2, 128), "int8")), "k.dtype=int8"),
        (dict(page_table=np.array([[1, 10]])), r"page_table\[0, 1\]=10, but 0..9"),
        (dict(kv_lengths=np.array([33])), "kv_lengths=.*0..32"),
        (dict(q_starts=np.array([0, 4])), "q_starts=.*0..3"),
        (dict(layer=1), "takes no layer"),
        (dict(pages=jnp.zeros((10, 2, 16, 256), "int8")), "int8 and have no scales"),
    ],
)
def test_bad_input(changes, message):
    given = dict(
        pages=jnp.zeros((10, 2, 16, 256)),
        k=jnp.zeros((3, 2, 128)),
        v=jnp.zeros((3, 2, 128)),
        page_table=np.array([[1, 2]]),
        kv_lengths=np.array([17]),
        q_starts=np.array([0, 3]),
    )
    with pytest.raises(InputError, match=message):
        paged_append(**(given | changes))
