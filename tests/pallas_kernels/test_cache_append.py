"""The contract of `cache_append`."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import cache_append
from pallas_kernels.cache_append import Blocks
from pallas_kernels.cache_append.cases import MODELS, SMALL
from pallas_kernels.cache_append.quantize import quantize_tokens
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.stored import encode


@functools.cache
def append(ring, implementation, blocks=None):
    return jax.jit(functools.partial(cache_append, ring=ring, implementation=implementation, blocks=blocks))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@given(st.data())
def test_contract(case, implementation, data):
    check(case, implementation, None, data)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@settings(max_examples=4)
@given(st.data())
def test_contract_of_the_kernel(case, data):
    check(case, "interpret", None, data)


@pytest.mark.parametrize("name", ["rows_long_chunk", "lanes_long_chunk", "int8_scaled", "ring_one_token"])
@settings(max_examples=3)
@given(st.data())
def test_blocks(name, data):
    """Two buffers, and rows of the batch together."""
    case = next(case for case in SMALL if case.name == name)
    check(case, "interpret", Blocks(8, depth=2, rows=case.batch), data)


def check(case, implementation, blocks, data):
    """Any starts, negative and beyond the end too, and any counts."""
    spread = st.lists(st.integers(-3, 3 * case.slots), min_size=case.batch, max_size=case.batch)
    starts = np.array(data.draw(spread), np.int32)
    sizes = st.lists(st.integers(0, case.tokens), min_size=case.batch, max_size=case.batch)
    counts = np.array(data.draw(sizes), np.int32)
    layer = None if case.layers is None else data.draw(st.integers(0, case.layers - 1))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    cache, new = (random.integers(-99, 99, shape) for shape in case.shapes)
    cache, new = encode(jnp.asarray(cache, jnp.float32), case.cache), jnp.asarray(new, case.new)
    # Padding may hold anything.
    padding = jnp.arange(case.tokens) >= counts[:, None]
    if jnp.issubdtype(new.dtype, jnp.floating):
        new = jnp.where(padding[:, None, :, None], jnp.nan, new)

    def wanted(cache, values):
        cache, values = np.asarray(cache), np.asarray(values)
        want = oracle.append(cache if case.layers else cache[None], values, layer or 0, starts, counts, case.ring)
        return want if case.layers else want[0]

    call = append(case.ring, implementation, blocks)
    if not case.scaled:
        out = call(cache, new, layer, starts, counts=counts)
        assert out.dtype == cache.dtype
        np.testing.assert_array_equal(np.asarray(out), wanted(cache, encode(new, cache.dtype)))
        return
    scales = jnp.asarray(random.uniform(1, 2, cache.shape[:-1]), jnp.float32)
    values, steps = quantize_tokens(new, cache.dtype)
    out, out_scales = call(cache, new, layer, starts, counts=counts, scales=scales)
    np.testing.assert_array_equal(np.asarray(out), wanted(cache, values))
    np.testing.assert_array_equal(out_scales[..., None], wanted(scales[..., None], steps[..., None]))


@given(st.sampled_from(["int8", "float8_e4m3fn", "float8_e5m2"]), st.integers(0, 99))
def test_quantised_tokens_are_near(dtype, seed):
    """Half a step of int8; half of the last bit kept by a float8."""
    random = np.random.default_rng(seed)
    x = (random.normal(size=(3, 5, 16)) * 10.0 ** random.integers(-3, 3, (3, 5, 1))).astype(np.float32)
    x[0, 0] = 0
    values, scale = quantize_tokens(jnp.asarray(x), dtype)
    back = np.asarray(values, np.float32) * np.asarray(scale)[..., None]
    largest = np.abs(x).max(-1, keepdims=True)
    step = {"int8": largest / 254, "float8_e4m3fn": np.maximum(np.abs(x) / 16, largest / 1e5)}
    allowed = step.get(dtype, np.maximum(np.abs(x) / 8, largest / 1e5)) * 1.001
    assert (np.abs(back - x) <= allowed).all()
    assert values.dtype == dtype


@given(st.lists(st.integers(0, 9), min_size=2, max_size=2))
@example([8, 9])
def test_counts_default_to_all(starts):
    cache, new = jnp.zeros((1, 2, 1, 9, 2)), jnp.ones((2, 1, 3, 2))
    whole = append(False, None)(cache, new, 0, np.array(starts), counts=np.array([3, 3]))
    np.testing.assert_array_equal(append(False, None)(cache, new, 0, np.array(starts)), whole)
    assert float(whole.sum()) == sum(2 * min(3, 9 - start) for start in starts)


def test_transforms():
    """A traced layer in a scan, and vmap over rows of caches."""
    new = jnp.arange(24.0).reshape(3, 2, 1, 2, 2)
    starts = jnp.array([1, 3])

    def one(cache, layer_new):
        return cache_append(cache, layer_new[1], layer_new[0], starts), None

    scanned, _ = jax.lax.scan(one, jnp.zeros((3, 2, 1, 5, 2)), (jnp.arange(3), new))
    wanted = np.zeros((3, 2, 1, 5, 2))
    for layer in range(3):
        wanted = oracle.append(wanted, np.asarray(new[layer]), layer, [1, 3], [2, 2], False)
    np.testing.assert_array_equal(scanned, wanted)
    mapped = jax.vmap(lambda n: cache_append(jnp.zeros((2, 1, 5, 2)), n, None, starts))(new)
    np.testing.assert_array_equal(mapped, wanted)


def test_the_kernel_says_what_it_cannot_do():
    cache, new = jnp.zeros((3, 1, 8, 4), jnp.float16), jnp.ones((3, 1, 1, 4))
    call = functools.partial(cache_append, cache, new, None, np.array([1, 2, 3]), blocks=Blocks(8, rows=2))
    with pytest.raises(UnsupportedError, match=r"float16.*rows=2"):
        call(implementation="pallas")
    assert float(call().sum()) == 12


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_named_cases_are_calls(case):
    call = case.call(implementation=None)
    out = jax.eval_shape(call.fn, *call.args)
    assert jax.tree.leaves(out)[0].shape == case.shapes[0]
    assert call.work.bytes > 0
