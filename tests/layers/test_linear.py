"""Linear layers and embeddings against numpy, in every dtype that weights are stored in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.layers import Embedding, Linear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_linear_sums_in_float32_and_rounds_once(dtype):
    layer = Linear(96, 40, axes=(None, None), bias=True, rngs=nnx.Rngs(0), dtype=dtype)
    layer.bias[...] = jnp.linspace(-1, 1, 40).astype(dtype)
    x = jax.random.normal(jax.random.key(1), (3, 5, 96)).astype(dtype)
    want = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.asarray(
        layer.bias[...], float
    )
    np.testing.assert_allclose(layer(x, out=jnp.float32), want, atol=1e-5)
    rounded = layer(x)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, layer(x, out=jnp.float32).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding_reads_rows_and_its_gradient_adds_to_them(dtype):
    layer = Embedding(11, 8, axes=(None, None), rngs=nnx.Rngs(0), dtype=dtype)
    ids = jnp.asarray([[3, 0, 3], [10, 1, 3]], jnp.int32)
    table = layer.table[...]
    np.testing.assert_array_equal(layer(ids), np.asarray(table)[np.asarray(ids)])

    def total(table, weights):
        graph, state = nnx.split(layer)
        rows = nnx.merge(graph, jax.tree.map(lambda _: table, state))(ids)
        return jnp.sum(rows.astype(jnp.float32) * weights)

    weights = jnp.arange(48.0).reshape(2, 3, 8)
    want = np.zeros((11, 8))
    np.add.at(want, np.asarray(ids), np.asarray(weights))
    gradient = jax.grad(total)(table, weights)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(np.asarray(gradient, np.float64), want, rtol=1e-2 if dtype == jnp.bfloat16 else 0)


def test_tied_heads_multiply_by_the_table():
    layer = Embedding(64, 16, axes=(None, None), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2, 16)).astype(jnp.bfloat16)
    want = np.asarray(x, np.float64) @ np.asarray(layer.table[...], np.float64).T
    got = layer.attend(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
