"""The contract of `flash_attention`'s kernel, in the interpreter: memory that nothing wrote holds nan there."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import flash_attention
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.flash_attention import Blocks, XlaBlocks
from pallas_kernels.flash_attention.cases import SMALL, Case, cells, constant, packed, per_head, tree

TINY = Blocks(32, 256, 2, 16, 128, 32, 1)
LANES = Blocks(256, 256, 2, 128, 128, 256, 2, ones=False)
MANY = (
    (Case("blocks", 1, 4, 2, 70, 300, 16, 8, options={"window": 150}, arrays={"q_offset": constant(190)}), TINY),
    (Case("short", 2, 3, 1, 40, 260, 16, 16, arrays={"lengths": constant(131, 0), "sinks": per_head}), TINY),
    (Case("both", 1, 2, 2, 40, 270, 24, 16, options={"causal": False, "window": (9, 140)}), TINY),
    (
        Case(
            "documents",
            1,
            2,
            1,
            40,
            280,
            16,
            16,
            options={"causal": False},
            arrays={"q_segment_ids": packed("queries", 3), "kv_segment_ids": packed("keys", 3)},
        ),
        TINY,
    ),
    (
        Case("cells", 1, 4, 2, 40, 270, 16, 16, options={"causal": False}, arrays={"block_mask": cells(4, 3, 9)}),
        TINY,
    ),
    (Case("lanes", 1, 2, 1, 270, 290, 64, 80, arrays={"q_offset": constant(20)}), LANES),
    (Case("lanes16", 1, 4, 2, 140, 160, 128, 64, dtype="bfloat16", options={"softcap": 9.0}), LANES),
)
CASES = [(case, None) for case in SMALL] + list(MANY)


def close(given, wanted, tolerance):
    given, wanted = np.asarray(given, np.float64), np.asarray(wanted, np.float64)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(given[~finite], wanted[~finite])
    np.testing.assert_allclose(given[finite], wanted[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("case", "blocks"), CASES, ids=[case.name for case, _ in CASES])
def test_contract(case, blocks):
    """Keys and queries that nothing may read are nan."""
    qkv, options = case.inputs()
    q, k, v = (np.asarray(jnp.asarray(x, case.dtype), np.float32) for x in qkv)
    want_out, want_lse, seen = oracle.attention(q, k, v, **options)
    used = oracle.used_keys(seen, case.kv_heads)
    hidden = (oracle.poisoned(q, seen.any(-1)), oracle.poisoned(k, used), oracle.poisoned(v, used))
    given = (jnp.asarray(x, case.dtype) for x in hidden)
    out, lse = flash_attention(*given, **options, return_lse=True, blocks=blocks, implementation="interpret")
    assert out.dtype == case.dtype
    assert lse.dtype == jnp.float32
    tolerance = 1e-2 if case.dtype == "bfloat16" else 2e-6
    close(out, want_out, tolerance * max(1.0, np.abs(want_out).max()))
    close(lse, want_lse, tolerance * max(1.0, np.abs(want_lse[np.isfinite(want_lse)]).max()))


@functools.cache
def everything_of(blocks):
    return jax.jit(
        lambda q, k, v, **arrays: flash_attention(
            q, k, v, window=(90, 2), return_lse=True, blocks=blocks, implementation="interpret", **arrays
        )
    )


@settings(max_examples=5)
@given(st.data())
def test_any_mask(data):
    """Random lengths, offsets, segments in any order, block masks and trees in one compiled program."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch, heads, groups, queries, keys = 2, 2, 1, 20, 150

    def numbers(low, high):
        return np.array(data.draw(st.lists(st.integers(low, high), min_size=batch, max_size=batch)), np.int32)

    arrays = dict(
        lengths=numbers(0, keys),
        q_offset=numbers(-3, keys),
        q_segment_ids=random.integers(0, data.draw(st.integers(1, 3)), (batch, queries), dtype=np.int32),
        kv_segment_ids=random.integers(0, 3, (batch, keys), dtype=np.int32),
        block_mask=random.random((heads, 4, 5)) < data.draw(st.sampled_from([0.2, 0.9, 1.0])),
        ancestor_mask=tree(random, type("Shape", (), dict(batch=batch, queries=queries))),
    )
    q, k, v = (
        random.normal(size=(batch, n, t, d)).astype(np.float32)
        for n, t, d in ((heads, queries, 8), (groups, keys, 8), (groups, keys, 8))
    )
    want_out, want_lse, seen = oracle.attention(q, k, v, window=(90, 2), **arrays)
    used = oracle.used_keys(seen, groups)
    q = oracle.poisoned(q, seen.any(-1))
    out, lse = everything_of(TINY)(q, oracle.poisoned(k, used), oracle.poisoned(v, used), **arrays)
    close(out, want_out, 3e-6)
    close(lse, want_lse, 3e-6)


def test_gradients():
    """Through the kernel and the backward pass of the XLA form, against the definition."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, n, 20, 16)), jnp.float32) for n in (4, 2, 2))
    sinks = jnp.asarray(random.normal(size=4), jnp.float32)

    def loss(implementation):
        def run(q, k, v, sinks):
            out, lse = flash_attention(
                q, k, v, sinks=sinks, window=9, return_lse=True, implementation=implementation
            )
            return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

        return jax.grad(run, (0, 1, 2, 3))(q, k, v, sinks)

    jax.tree.map(lambda a, b: close(a, b, 2e-5), loss("interpret"), loss("reference"))


def shapes(dtype=jnp.float32, heads=2, queries=64, keys=64, dim=16):
    return (
        jax.ShapeDtypeStruct((1, heads, queries, dim), dtype),
        *[jax.ShapeDtypeStruct((1, 1, keys, dim), dtype)] * 2,
    )


def test_lowers_for_tpus():
    """By default the kernel is what a TPU gets, in a gradient too, and what it cannot do goes to the XLA form."""

    def text(dtype):
        grad = jax.grad(lambda q, k, v: flash_attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
        return (
            jax.jit(grad).trace(*shapes(dtype, queries=256, keys=256)).lower(lowering_platforms=("tpu",)).as_text()
        )

    assert "tpu_custom_call" in text(jnp.bfloat16)
    assert "tpu_custom_call" not in text(jnp.float16)


def test_all_reasons_are_listed():
    q, k, v = shapes(jnp.float16, dim=12, queries=2049)
    mask = jax.ShapeDtypeStruct((2049, 2049), jnp.bool_)
    with pytest.raises(UnsupportedError, match=r"float16.*head sizes 12.*2049 nodes"):
        jax.eval_shape(
            lambda q, k, v, mask: flash_attention(q, k, v, ancestor_mask=mask, implementation="pallas"),
            q,
            k,
            v,
            mask,
        )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (Blocks(4096, 4096, 8, 1024, 1024, 1024, 6), "need .* MiB of VMEM"),
        (Blocks(16, 128, 1, 16, 128, 16, 0), "bytes of SMEM"),
        (XlaBlocks(8, 8), "takes Blocks"),
    ],
)
def test_blocks_that_do_not_fit(blocks, message):
    q, k, v = shapes(jnp.bfloat16, 8, 1 << 16, 1 << 16, 256)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda *x: flash_attention(*x, blocks=blocks, implementation="pallas"), q, k, v)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 128, 1, 16, 128, 16, 0),
        (24, 128, 1, 24, 128, 24, 0),
        (32, 128, 1, 16, 64, 16, 0),
        (512, 1024, 1, 16, 128, 16, 0),
    ],
)
def test_impossible_blocks(sizes):
    with pytest.raises(InputError, match="blocks="):
        Blocks(*sizes)
