"""Every format: what rounding may cost, and what products make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinf.core.stacked import Stacked
from jaxinf.quant import FORMATS, QTensor, format_of, grouped, matmul, nbytes, round_to_nearest
from jaxinf.quant.formats import E2M1, NF4
from pallas_kernels.errors import InputError

# The widest gap between neighbouring values, as a part of a group's largest entry; half of it bounds the error.
GAPS = {
    "int8": 1 / 127.5,
    "int4": 1 / 7.5,
    "fp8_e4m3": 32 / 448,
    "fp8_e5m2": 2**14 / 57344 / 2,
    "nf4": 1 - 0.6961928,
}
encode = {name: jax.jit(format, static_argnums=1) for name, format in FORMATS.items()}


@pytest.mark.parametrize("name", GAPS)
@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.booleans())
def test_error_of_a_group_is_bounded_by_its_largest_entry(name, seed, size, skewed):
    random = np.random.default_rng(seed)
    w = size * random.normal(size=(2, 128, 5)).astype(np.float32)
    w = abs(w) ** 3 / size**2 if skewed and size == 1 else w
    q = encode[name](w, 32)
    largest = abs(w).reshape(2, 4, 32, 5).max(2).repeat(32, 1)
    error = abs(q.dequantize() - w)
    if name == "int4":  # which may clip, if that is better for the whole group
        error = np.sqrt(np.mean(np.float64(error).reshape(2, 4, 32, 5) ** 2, axis=2)).repeat(32, 1)
    assert (error <= GAPS[name] / 2 * largest * (1 + 1e-4)).all()
    assert q.groups == 4


@pytest.mark.parametrize("name", FORMATS)
def test_odd_inputs(name):
    """Zeros stay zeros, equal entries stay equal, denormals do not turn into NaN."""
    zero = encode[name](jnp.zeros((64, 3)), None).dequantize()
    assert (zero == 0).all()
    small = encode[name](jnp.full((64, 3), 1e-40), None).dequantize()
    assert (abs(small - 1e-40) <= 1e-40).all()
    ones = encode[name](jnp.full((64, 3), 0.75), None).dequantize()
    np.testing.assert_allclose(ones, 0.75, rtol=0.5 / 127.5)
    one_column = encode[name](jnp.asarray(np.random.default_rng(0).normal(size=(64, 1)), jnp.float32), None)
    assert np.isfinite(one_column.dequantize()).all()


def test_codes_of_mxfp4_and_nf4_are_the_nearest():
    w = np.random.default_rng(1).normal(size=(64, 7)).astype(np.float32)
    for name, table in (("mxfp4", E2M1), ("nf4", NF4)):
        q = encode[name](w, 32)
        scales = np.asarray(q.scales, np.float32).repeat(32, 0)
        best = abs(w[..., None] - scales[..., None] * table).min(-1)
        np.testing.assert_allclose(abs(q.dequantize() - w), best, atol=1e-6)
    exponents = np.asarray(encode["mxfp4"](w, 32).scales, np.float32)
    assert (np.frexp(exponents)[0] == 0.5).all()


def test_mxfp4_numbers_are_kept():
    """Whatever is a 4-bit float times a power of two comes back bit for bit."""
    random = np.random.default_rng(0)
    w = E2M1[random.integers(0, 16, (2, 32, 9))] * 2.0 ** random.integers(-20, 20, (2, 1, 9))
    w = w.reshape(64, 9).astype(np.float32)
    np.testing.assert_array_equal(encode["mxfp4"](w, None).dequantize(), w)


def test_k_means_of_a_few_values_are_those():
    w = np.random.default_rng(0).choice(np.float32([-3, 0, 0.5, 7]), (32, 32))
    for name in ("kmeans4", "kmeans8"):
        np.testing.assert_allclose(encode[name](w, None).dequantize(), w, atol=1e-6)


def test_ternary_is_that_of_the_paper():
    w = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
    q = encode["ternary"](w, None)
    gamma = abs(w).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(q.dequantize(), np.clip(np.rint(w / gamma), -1, 1) * gamma, rtol=1e-6)


def test_sizes():
    """Bits a weight, scales included; sub-byte codes lie packed."""
    bits = {n: 8 * encode[n](jnp.ones((256, 512)), None).nbytes / (256 * 512) for n in FORMATS}
    assert bits["int8"] == 8 + 32 / 256
    assert bits["int4"] == 4 + 32 / 128
    assert bits["mxfp4"] == pytest.approx(4 + 8 / 32, abs=0.01)
    assert bits["ternary"] == 2 + 32 / 256
    assert bits["kmeans4"] < 4.2
    assert nbytes({"a": jnp.ones(3, jnp.int2), "b": jnp.ones((2, 2))}) == 17


def test_groups():
    assert format_of("int4").group(192) == 64
    with pytest.raises(InputError, match=r"none of which divides 40; give group= one of 8, 10, 20, 40"):
        format_of("int4").group(40)
    with pytest.raises(InputError, match=r"group=48 .* these do: 1, 2, 4"):
        round_to_nearest(jnp.ones((64, 4)), "int4", 48)
    with pytest.raises(InputError, match="has no groups"):
        round_to_nearest(jnp.ones((64, 4)), "ternary", 32)
    with pytest.raises(InputError, match="must be one of int8, int4"):
        format_of("int3")


def whole(random, shape=(3, 64, 24)) -> QTensor:
    """Every field at once, stacked over three matrices."""
    w = jnp.asarray(random.normal(size=shape), jnp.float32)
    q = encode["int4"](w, 16)
    rows = jnp.asarray([[3, -1, 40], [0, 63, 5], [-1, -1, 9]], jnp.int32)
    used = jnp.where(rows < 0, shape[1], rows)
    values = jnp.stack([v.at[r].set(0, mode="drop") for v, r in zip(q.values, used, strict=True)])
    return QTensor(
        values,
        q.scales,
        zeros=jnp.where(jnp.arange(4)[:, None] == 2, 1.5, 0.0) * jnp.ones((3, 4, 24)),
        outliers=jnp.asarray(random.normal(size=(3, 3, 24)), jnp.float32),
        rows=rows,
        order=jnp.stack([jnp.asarray(random.permutation(64), jnp.int32) for _ in range(3)]),
    )


def dense(q: QTensor) -> np.ndarray:
    """By its definition, in numpy."""
    w = (np.asarray(q.values, np.float32) - np.asarray(q.zeros).repeat(16, 1)) * np.asarray(q.scales).repeat(16, 1)
    out = np.zeros_like(w)
    for i in range(len(w)):
        for m, row in enumerate(np.asarray(q.rows[i])):
            if row >= 0:
                w[i, row] = q.outliers[i, m]
        out[i, np.asarray(q.order[i])] = w[i]
    return out


def test_all_fields_together():
    random = np.random.default_rng(0)
    q = whole(random)
    zeroed = jax.tree.map(lambda x: x, q)
    want = dense(q)
    np.testing.assert_allclose(q.dequantize(), want, rtol=1e-6, atol=1e-6)
    x = jnp.asarray(random.normal(size=(5, 64)), jnp.float32)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], zeroed)
        got = jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32))(x, one)
        np.testing.assert_allclose(got, x @ want[i], rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda a: Stacked(a, jnp.int32(2)), q)
    got = jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32))(x, stacked)
    np.testing.assert_allclose(got, x @ want[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_every_format_alone_and_in_a_scan(name):
    random = np.random.default_rng(0)
    q = encode[name](jnp.asarray(random.normal(size=(3, 64, 24)), jnp.float32), None)
    x = jnp.asarray(random.normal(size=(2, 64)), jnp.float32)
    want = jnp.einsum("mk,lkn->lmn", x, q.dequantize(), precision="highest")

    def run(x, q):
        def body(_, at):
            layer, own = at
            in_place = jax.tree.map(lambda a: Stacked(a, layer), q)
            return None, (matmul(x, own, out_dtype=jnp.float32), matmul(x, in_place, out_dtype=jnp.float32))

        return jax.lax.scan(body, None, (jnp.arange(3), q))[1]

    for got in jax.jit(run)(x, q):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_products_of_every_format(name):
    """A stack of layers of experts: each row meets its expert's matrix."""
    random = np.random.default_rng(0)
    q = encode[name](jnp.asarray(random.normal(size=(2, 3, 64, 24)), jnp.float32), None)
    x = jnp.asarray(random.normal(size=(7, 64)), jnp.float32)
    stacked = jax.tree.map(lambda a: Stacked(a, jnp.int32(1)), q)
    got = jax.jit(grouped)(x, stacked, jnp.asarray([2, 0, 4], jnp.int32))
    wide = q.dequantize()[1]
    want = jnp.concatenate([x[:2] @ wide[0], x[2:6] @ wide[2], jnp.zeros((1, 24))])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
