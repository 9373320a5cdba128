"""The contract of `quantized_matmul`: every implementation at every small case, and what the XLA form promises."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import quantized_matmul
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.quantized_matmul.cases import MODELS, SMALL

CASES = {case.name: case for case in SMALL}
IMPLEMENTATIONS = ("reference", "xla")
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}


def expected(x, w, scales, transpose):
    """float64 products, and the sums of the absolute values of their terms, which rounding is relative to."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w = w.T if transpose else w
    w = w if scales is None else w * np.asarray(scales, np.float64)
    return x @ w, abs(x) @ abs(w)


def arguments(case, seed=0):
    x, w, scales = case.inputs(seed)
    return jnp.asarray(x, case.dtype), jnp.asarray(w).astype(case.weight), scales


def call(case, implementation):
    return functools.partial(
        quantized_matmul, transpose=case.transpose, out_dtype=case.out, implementation=implementation
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, implementation):
    case = CASES[name]
    x, w, scales = arguments(case)
    got = jax.jit(call(case, implementation))(x, w, scales)
    assert got.dtype == (case.out or case.dtype)
    assert got.shape == (*case.lead, case.columns)
    want, terms = expected(x, w, scales, case.transpose)
    error = abs(np.asarray(got, np.float64) - want)
    assert (error <= 2e-6 * terms + ROUNDING[case.out or case.dtype] * abs(want)).all(), error.max()


GRADIENTS = [
    "float32-float32-odd",
    "float32-float32-many-rows-transposed",
    "float32-int8-one-row",
    "float32-int8-many-rows-transposed",
    "float32-bfloat16-three-rows",
    "bfloat16-bfloat16-many-rows",
    "bfloat16-int8-three-rows-transposed",
]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_match_the_reference(name):
    case = CASES[name]
    x, w, scales = arguments(case)
    wanted = (0, 1) if scales is None else (0, 2)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*case.lead, case.columns)), jnp.float32)

    def gradients(implementation):
        def loss(x, w, scales):
            return jnp.vdot(call(case, implementation)(x, w, scales).astype(jnp.float32), weights)

        return jax.jit(jax.grad(loss, wanted))(x, w, scales)

    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        assert got.dtype == want.dtype
        narrow = "bfloat16" in (case.dtype, got.dtype.name)
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, atol=(1e-2 if narrow else 5e-6) * abs(want).max(), rtol=0)


@functools.cache
def _compiled(weight: str, transpose: bool):
    random = np.random.default_rng(0)
    w = jnp.asarray(np.clip(40 * random.normal(size=(192, 192)), -127, 127).round()).astype(weight)
    scales = jnp.ones(192) if weight == "int8" else None
    return jax.jit(lambda x: quantized_matmul(x, w, scales, transpose=transpose)), w


@given(
    weight=st.sampled_from(["bfloat16", "int8"]),
    transpose=st.booleans(),
    rows=st.sampled_from([1, 3]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_products_are_exact_whatever_the_scale_of_the_activations(weight, transpose, rows, exponent, seed):
    run, w = _compiled(weight, transpose)
    random = np.random.default_rng(seed)
    # Outliers a thousand times the rest, as activations have.
    x = random.normal(size=(rows, 192)) * 10.0 ** random.choice([0, 0, 0, 3], size=(rows, 192)) * 2.0**exponent
    x = x.astype(np.float32)
    want, terms = expected(x, w, None, transpose)
    assert (abs(run(x) - want) <= 2e-6 * terms).all()


@pytest.mark.parametrize("weight", ["bfloat16", "int8"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_what_is_not_finite_stays_in_its_row(weight, transpose, rows):
    run, w = _compiled(weight, transpose)
    x = np.ones((rows + 1, 192), np.float32)
    x[0, 3], x[-1, 5] = np.nan, np.inf
    out = np.asarray(run(x))
    assert np.isnan(out[0]).all()
    assert not np.isfinite(out[-1]).any()
    np.testing.assert_allclose(out[1:-1], expected(x[1:-1], w, None, transpose)[0], rtol=1e-4, atol=1e-2)


def test_under_vmap_and_scan():
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 1, 192)).astype(np.float32)
    w = jnp.asarray(random.integers(-127, 127, (3, 192, 256)), jnp.int8)
    scales = random.uniform(size=(3, 256)).astype(np.float32)
    batched = jax.jit(jax.vmap(quantized_matmul))(x, w, scales)
    shared = jax.jit(jax.vmap(quantized_matmul, (0, None, None)))(x, w[0], scales[0])
    _, scanned = jax.lax.scan(lambda c, layer: (c, quantized_matmul(*layer)), 0, (x, w, scales))
    for i in range(3):
        want, terms = expected(x[i], w[i], scales[i], False)
        assert (abs(batched[i] - want) <= 2e-6 * terms).all()
        assert (abs(scanned[i] - want) <= 2e-6 * terms).all()
        want, terms = expected(x[i], w[0], scales[0], False)
        assert (abs(shared[i] - want) <= 2e-6 * terms).all()


@pytest.mark.parametrize(("dtype", "weight"), [("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "int8")])
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("transpose", [False, True])
def test_narrow_weights_are_not_widened_whole(dtype, weight, rows, transpose):
    inner, columns, layers = 256, 2048, 3

    def step(x, weights):
        for w in weights:
            x = quantized_matmul(x, w, scales, transpose=transpose)[:, :inner]
        return x

    scales = jnp.ones(columns) if weight == "int8" else None
    w = jnp.ones((columns, inner) if transpose else (inner, columns), weight)
    program = jax.jit(step).lower(jnp.ones((rows, inner), dtype), [w] * layers).compile()
    # Of all layers together: one weight in float32 would be more.
    assert program.memory_analysis().temp_size_in_bytes < 4 * w.size


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_one_dot_of_the_activations_dtype(platform):
    x, w = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((256, 512), jnp.int8)
    text = jax.export.export(jax.jit(quantized_matmul), platforms=[platform])(x, w, jnp.ones(512)).mlir_module()
    assert text.count("stablehlo.dot_general") == 1
    assert "(tensor<1x256xbf16>, tensor<256x512xbf16>) -> tensor<1x512xf32>" in text
    assert "while" not in text


def test_float32_products_have_the_highest_precision_everywhere():
    x, w = jnp.ones((4, 256)), jnp.ones((256, 512))
    text = jax.export.export(jax.jit(quantized_matmul), platforms=["tpu"])(x, w).mlir_module()
    assert "precision = [HIGHEST, HIGHEST]" in text


def refused(error, match, x=(2, 8), w=(8, 5), scales=None, x_dtype="float32", dtype="float32", **options):
    with pytest.raises(error, match=match):
        quantized_matmul(jnp.ones(x, x_dtype), jnp.ones(w, dtype), scales, **options)


def test_what_does_not_fit_is_refused():
    refused(InputError, r"\[K, N\] with transpose=False", w=(5, 8))
    refused(InputError, r"\[N, K\] with transpose=True", transpose=True)
    refused(InputError, r"must be \[\.\.\., K\]", x=())
    refused(InputError, "scales missing", dtype="int8")
    refused(InputError, "scales given", scales=jnp.ones(5))
    refused(InputError, r"must be float32 \[5\]", dtype="int8", scales=jnp.ones(4))
    refused(InputError, r"must be float32 \[5\]", dtype="int8", scales=jnp.ones(5, jnp.bfloat16))
    refused(InputError, "implementation='fast'", implementation="fast")
    refused(UnsupportedError, "w.dtype=int4", dtype="int4")
    refused(UnsupportedError, "w.dtype=float8_e4m3fn", dtype="float8_e4m3fn")
    refused(UnsupportedError, "int32 is not served", x_dtype="int32")
    refused(UnsupportedError, "int32 is not served", out_dtype="int32")


def test_model_cases_are_named_once():
    assert len({case.name for case in MODELS}) == len(MODELS)
