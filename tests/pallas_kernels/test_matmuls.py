"""`grouped_matmul` and `quantized_matmul`: every implementation against float64 products in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, quantized_matmul
from pallas_kernels.errors import JaxinfError

FORMS = ["reference", "xla"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


def drawn(seed: int, shape, dtype="float32") -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(jax.random.key(seed), shape, -127, 128, jnp.int8)
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def close(got, want, dtype: str) -> None:
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=TOLERANCE[dtype] * max(1, np.abs(want).max())
    )


GROUPS = {
    "even": (12, [4, 4, 4]),
    "empty groups": (9, [0, 5, 0, 4, 0]),
    "one row": (1, [0, 1, 0]),
    "all in one": (70, [0, 70]),
    "rows left over": (10, [3, 0, 4]),
    "nothing": (3, [0, 0]),
    "many rows": (600, [130, 1, 0, 400]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("weight", ["float32", "bfloat16", "int8"])
def test_each_row_meets_its_groups_matrix(form, name, weight):
    rows, sizes = GROUPS[name]
    dtype = "bfloat16" if weight == "bfloat16" else "float32"
    lhs, rhs = drawn(0, (rows, 48), dtype), drawn(1, (len(sizes), 48, 40), weight)
    scale = jnp.abs(drawn(2, (len(sizes), 40))) / 127 if weight == "int8" else None
    matrices = np.asarray(rhs, np.float64) * (1 if scale is None else np.asarray(scale, np.float64)[:, None])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    want = np.zeros((rows, 40))
    for row, group in enumerate(owner):
        want[row] = np.asarray(lhs[row], np.float64) @ matrices[group]
    # What belongs to nobody may hold anything.
    lhs = lhs.at[len(owner) :].set(jnp.nan)
    if weight != "int8":
        rhs = jnp.where((np.asarray(sizes) == 0)[:, None, None], jnp.nan, rhs.astype(jnp.float32)).astype(weight)
    got = jax.jit(lambda *a: grouped_matmul(*a, rhs_scale=scale, implementation=form))(
        lhs, rhs, jnp.asarray(sizes, jnp.int32)
    )
    assert got.dtype == jnp.dtype(dtype)
    close(got, want, dtype)


@pytest.mark.parametrize("name", ["even", "empty groups", "rows left over", "many rows"])
def test_gradients_of_groups(name):
    rows, sizes = GROUPS[name]
    lhs, rhs, weights = drawn(0, (rows, 16)), drawn(1, (len(sizes), 16, 24)), drawn(2, (rows, 24))
    sizes = jnp.asarray(sizes, jnp.int32)

    def gradients(form):
        def loss(lhs, rhs):
            return jnp.sum(grouped_matmul(lhs, rhs, sizes, implementation=form) * weights)

        return jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs)

    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 40])
@pytest.mark.parametrize(
    ("x", "w"), [("float32",) * 2, ("float32", "int8"), ("bfloat16",) * 2, ("float32", "bfloat16")]
)
@pytest.mark.parametrize("shape", [(256, 192), (100, 37)])
def test_products_with_stored_weights(form, transpose, rows, x, w, shape):
    inner, columns = shape
    a, b = drawn(0, (rows, inner), x), drawn(1, (columns, inner) if transpose else shape, w)
    scales = jnp.abs(drawn(2, (columns,))) / 127 if w == "int8" else None
    want = np.asarray(a, np.float64) @ (np.asarray(b, np.float64).T if transpose else np.asarray(b, np.float64))
    want = want if scales is None else want * np.asarray(scales, np.float64)
    options = dict(transpose=transpose, implementation=form)
    got = quantized_matmul(a, b, scales, out_dtype=jnp.float32, **options)
    close(got, want, "float32")
    rounded = quantized_matmul(a, b, scales, **options)
    assert rounded.dtype == a.dtype
    close(rounded, want, x)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_of_products(rows, transpose):
    x, w, weights = drawn(0, (rows, 192)), drawn(1, (192, 192)), drawn(2, (rows, 192))

    def gradients(form):
        def loss(x, w):
            return jnp.sum(quantized_matmul(x, w, transpose=transpose, implementation=form) * weights)

        return jax.jit(jax.grad(loss, (0, 1)))(x, w)

    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: quantized_matmul(jnp.zeros((2, 3)), jnp.zeros((4, 5))),
        lambda: quantized_matmul(jnp.zeros((2, 4)), jnp.zeros((4, 5), jnp.int8)),
        lambda: quantized_matmul(jnp.zeros((2, 4)), jnp.zeros((4, 5)), jnp.ones(5)),
        lambda: quantized_matmul(jnp.zeros((2, 4)), jnp.zeros((4, 5)), implementation="magic"),
        lambda: quantized_matmul(jnp.zeros((2, 4)), jnp.zeros((4, 5), jnp.int32)),
        lambda: grouped_matmul(jnp.zeros((2, 4)), jnp.zeros((3, 5, 6)), jnp.zeros(3, jnp.int32)),
        lambda: grouped_matmul(jnp.zeros((2, 4)), jnp.zeros((3, 4, 6)), jnp.zeros(2, jnp.int32)),
        lambda: grouped_matmul(jnp.zeros((2, 4)), jnp.zeros((3, 4, 6), jnp.int8), jnp.zeros(3, jnp.int32)),
        lambda: grouped_matmul(jnp.zeros((2, 4)), jnp.zeros((3, 4, 6)), jnp.full(3, 9, jnp.int32)),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(JaxinfError):
        call()
