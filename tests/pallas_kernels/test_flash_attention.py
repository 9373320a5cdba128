"""The contract of `flash_attention`: implementations against the rules, gradients against the reference."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import flash_attention
from pallas_kernels.errors import InputError
from pallas_kernels.flash_attention import XlaBlocks
from pallas_kernels.flash_attention.cases import MODELS, SMALL, tree

CASES = {case.name: case for case in SMALL}
SMALL_BLOCKS = (XlaBlocks(8, 16), XlaBlocks(5, 7, rows=1, heads=1))
VARIANTS = [
    (case, implementation, blocks)
    for number, case in enumerate(SMALL)
    for implementation, blocks in (("reference", None), ("xla", None), ("xla", SMALL_BLOCKS[number % 2]))
    if blocks is None or case.keys > blocks.kv
]


@functools.cache
def expected(name):
    """Inputs with nan in all that nothing may read, and the oracle's answer."""
    case = CASES[name]
    qkv, options = case.inputs()
    q, k, v = (np.asarray(jnp.asarray(x, case.dtype), np.float32) for x in qkv)
    out, lse, seen = oracle.attention(q, k, v, **options)
    used = oracle.used_keys(seen, case.kv_heads)
    hidden = (oracle.poisoned(q, seen.any(-1)), oracle.poisoned(k, used), oracle.poisoned(v, used))
    return hidden, options, out, lse


@functools.cache
def results(name, implementation, blocks):
    """out, lse, and gradients of a random projection of both in q, k, v and the options that learn."""
    case = CASES[name]
    hidden, options, *_ = expected(name)
    learned = {key: options[key] for key in ("sinks", "alibi_slopes") if key in options}
    random = np.random.default_rng(1)

    @jax.jit
    def run(qkv, learned, arrays):
        def forward(qkv, learned):
            return flash_attention(
                *qkv,
                **(static | arrays | learned),
                return_lse=True,
                implementation=implementation,
                blocks=blocks,
            )

        (out, lse), pull = jax.vjp(forward, qkv, learned)
        weights = jnp.where(jnp.isfinite(lse), jnp.asarray(random.normal(size=lse.shape), jnp.float32), 0)
        return out, lse, pull((jnp.asarray(random.normal(size=out.shape), out.dtype), weights))

    arrays = {key: x for key, x in options.items() if isinstance(x, np.ndarray) and key not in learned}
    static = {key: x for key, x in options.items() if not isinstance(x, np.ndarray)}
    qkv = tuple(jnp.asarray(x, case.dtype) for x in hidden)
    return run(qkv, learned, arrays)


def close(given, wanted, tolerance):
    given, wanted = np.asarray(given, np.float64), np.asarray(wanted, np.float64)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(given[~finite], wanted[~finite])
    np.testing.assert_allclose(given[finite], wanted[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("case", "implementation", "blocks"),
    VARIANTS,
    ids=[f"{case.name}-{implementation}{'-small' if blocks else ''}" for case, implementation, blocks in VARIANTS],
)
def test_contract(case, implementation, blocks):
    _, _, want_out, want_lse = expected(case.name)
    out, lse, gradients = results(case.name, implementation, blocks)
    assert out.dtype == case.dtype
    assert lse.dtype == jnp.float32
    narrow = case.dtype == "bfloat16"
    close(out, want_out, 1e-2 if narrow else 3e-6)
    close(lse, want_lse, 3e-6)
    *_, wanted = results(case.name, "reference", None)
    scale = 5e-2 if narrow else 2e-5
    jax.tree.map(lambda a, b: close(a, b, scale * max(1.0, float(jnp.abs(b).max()))), gradients, wanted)


@functools.cache
def everything_of(blocks):
    return jax.jit(
        lambda q, k, v, **arrays: flash_attention(q, k, v, window=(5, 2), return_lse=True, blocks=blocks, **arrays)
    )


@given(st.data())
@pytest.mark.parametrize("blocks", [None, XlaBlocks(4, 3, rows=1)], ids=["whole", "blocks"])
def test_any_mask(blocks, data):
    """Random lengths, offsets, segments in any order, block masks and trees in one compiled program."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch, heads, groups, queries, keys = 2, 4, 2, 6, 11

    def numbers(low, high, *shape):
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
        for n, t, d in ((heads, queries, 8), (groups, keys, 8), (groups, keys, 4))
    )
    want_out, want_lse, seen = oracle.attention(q, k, v, window=(5, 2), **arrays)
    used = oracle.used_keys(seen, groups)
    q = oracle.poisoned(q, seen.any(-1))
    out, lse = everything_of(blocks)(q, oracle.poisoned(k, used), oracle.poisoned(v, used), **arrays)
    close(out, want_out, 3e-6)
    close(lse, want_lse, 3e-6)


def test_transforms():
    """vmap and scan over calls give what the calls give."""
    q, k, v = (jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 2, 9, 8)), jnp.float32) for _ in range(3))
    lengths = jnp.array([[9], [4], [0]])

    def one(q, k, v, lengths):
        return flash_attention(q, k, v, lengths=lengths, blocks=XlaBlocks(4, 4))

    alone = jnp.stack([one(*args) for args in zip(q, k, v, lengths, strict=True)])
    np.testing.assert_allclose(jax.vmap(one)(q, k, v, lengths), alone, atol=1e-6)
    scanned = jax.lax.scan(lambda _, args: (None, one(*args)), None, (q, k, v, lengths))[1]
    np.testing.assert_allclose(scanned, alone, atol=1e-6)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_axes(empty):
    sizes = dict(batch=2, queries=3, keys=4) | {empty: 0}
    q = jnp.ones((sizes["batch"], 2, sizes["queries"], 8))
    k = jnp.ones((sizes["batch"], 1, sizes["keys"], 8))
    out, lse = flash_attention(q, k, k, return_lse=True)
    assert out.shape == q.shape
    assert not out.any()
    assert bool((lse == -jnp.inf).all())


def test_memory_is_linear():
    """Temporaries of the forward and the backward pass, compiled: 32k queries and keys against 16k."""

    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((1, 2, tokens, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: flash_attention(q, k, v, window=4096).sum(), (0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(16 * 1024), temporaries(32 * 1024)
    assert long < 2.1 * short
    assert long < 16 * (2 * 32 * 1024 * 16 * 4)  # a few times the arguments; the scores would be 8 GiB


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_named_cases_are_calls(case):
    q, k, v = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in case.shapes)
    made = {name: jnp.asarray(make(np.random.default_rng(0), case)) for name, make in case.arrays.items()}
    out = jax.eval_shape(lambda q, k, v: flash_attention(q, k, v, **case.options, **made), q, k, v)
    assert out.shape == (*q.shape[:3], case.value_dim)
    assert out.dtype == case.dtype


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("name", ["chunk", "lengths", "everything"])
def test_a_layer_of_stacked_keys_and_values(implementation, name):
    case = next(c for c in SMALL if c.name == name)
    (q, k, v), options = case.inputs()
    stacks = [jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.full_like(x, jnp.nan)]) for x in (k, v)]
    want = flash_attention(*map(jnp.asarray, (q, k, v)), **options, implementation="reference")
    run = jax.jit(lambda layer: flash_attention(q, *stacks, **options, layer=layer, implementation=implementation))
    np.testing.assert_allclose(run(1), want, atol=2e-6 * np.abs(want).max())


def test_gradients_reach_the_layer_that_was_read():
    (q, k, v), options = next(c for c in SMALL if c.name == "chunk").inputs()
    stacks = [jnp.stack([x + 1, x]) for x in (k, v)]

    def loss(k, v, layer):
        return jnp.sum(jnp.sin(flash_attention(jnp.asarray(q), k, v, layer=layer, **options)))

    want = jax.grad(lambda k, v: loss(k, v, None), (0, 1))(jnp.asarray(k), jnp.asarray(v))
    for got, one in zip(jax.grad(lambda k, v: loss(k, v, 1), (0, 1))(*stacks), want, strict=True):
        assert not np.any(got[0])
        np.testing.assert_allclose(got[1], one, atol=1e-5)


def test_a_stack_needs_a_layer():
    q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((3, 1, 2, 4, 8))
    with pytest.raises(InputError, match="layer"):
        flash_attention(q, k, k)
    with pytest.raises(InputError, match="layer"):
        flash_attention(q, k[0], k[0], layer=0)
    with pytest.raises(InputError, match="stacks 3 layers"):
        flash_attention(q, k, k, layer=3)
