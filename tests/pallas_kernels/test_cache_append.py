"""The contract of `cache_append`."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pallas_kernels import cache_append
from pallas_kernels.cache_append.cases import MODELS, SMALL
from pallas_kernels.stored import encode


@functools.cache
def append(ring, implementation):
    return jax.jit(functools.partial(cache_append, ring=ring, implementation=implementation))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@given(st.data())
def test_contract(case, implementation, data):
    """Any starts, negative and beyond the end too, and any counts."""
    spread = st.lists(st.integers(-3, 3 * case.slots), min_size=case.batch, max_size=case.batch)
    starts = np.array(data.draw(spread), np.int32)
    sizes = st.lists(st.integers(0, case.tokens), min_size=case.batch, max_size=case.batch)
    counts = np.array(data.draw(sizes), np.int32)
    layer = None if case.layers is None else data.draw(st.integers(0, case.layers - 1))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    cache, new = (random.integers(-99, 99, shape) for shape in case.shapes)
    cache, new = encode(jnp.asarray(cache, jnp.float32), case.cache), jnp.asarray(new, case.new)

    out = append(case.ring, implementation)(cache, new, layer, starts, counts=counts)
    assert out.dtype == cache.dtype
    cache, new = (np.asarray(x) for x in (cache, encode(new, cache.dtype)))
    want = oracle.append(cache if case.layers else cache[None], new, layer or 0, starts, counts, case.ring)
    np.testing.assert_array_equal(np.asarray(out), want if case.layers else want[0])


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


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_named_cases_are_calls(case):
    cache, new = case.shapes
    starts = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    out = jax.eval_shape(
        lambda cache, new, starts: cache_append(cache, new, 1, starts, ring=case.ring),
        jax.ShapeDtypeStruct(cache, case.cache),
        jax.ShapeDtypeStruct(new, case.new),
        starts,
    )
    assert out.shape == cache
