"""The contract of `grouped_matmul`: every implementation at every small case, and what the XLA form promises."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.grouped_matmul.cases import MODELS, SMALL, Case

CASES = {case.name: case for case in SMALL}
IMPLEMENTATIONS = ("reference", "xla")
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}


def expected(lhs, rhs, sizes, scale, transpose):
    """float64 products, and the sums of the absolute values of their terms, which rounding is relative to."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    rhs = rhs.swapaxes(1, 2) if transpose else rhs
    rhs = rhs if scale is None else rhs * np.asarray(scale, np.float64)[:, None]
    out, terms = np.zeros((2, len(lhs), rhs.shape[2]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row], terms[row] = lhs[row] @ rhs[group], abs(lhs[row]) @ abs(rhs[group])
    return out, terms


def poisoned(case: Case, seed=0):
    """Arguments with nan in what belongs to no group and in the matrices of empty groups, as jax arrays."""
    lhs, rhs, sizes, scale = case.inputs(seed)
    lhs[sizes.sum() :] = np.nan
    if case.weight != "int8":
        rhs[sizes == 0] = np.nan
    else:
        scale[sizes == 0] = np.nan
    return jnp.asarray(lhs, case.dtype), jnp.asarray(rhs).astype(case.weight), jnp.asarray(sizes), scale


def call(case, implementation):
    return functools.partial(grouped_matmul, transpose=case.transpose, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, implementation):
    case = CASES[name]
    lhs, rhs, sizes, scale = poisoned(case)
    got = jax.jit(call(case, implementation))(lhs, rhs, sizes, rhs_scale=scale)
    assert got.dtype == lhs.dtype
    want, terms = expected(lhs, rhs, sizes, scale, case.transpose)
    error = abs(np.asarray(got, np.float64) - want)
    assert (error <= 2e-6 * terms + ROUNDING[case.dtype] * abs(want)).all(), error.max()


GRADIENTS = ["empty-groups", "rows-left-over", "odd", "past-a-tile", "many-rows", "transposed", "bfloat16-many"]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_match_the_reference(name):
    case = CASES[name]
    lhs, rhs, sizes, _ = poisoned(case)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.columns)), jnp.float32)

    def gradients(implementation):
        def loss(lhs, rhs):
            return jnp.vdot(call(case, implementation)(lhs, rhs, sizes).astype(jnp.float32), weights)

        return jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs)

    tolerance = {"float32": 5e-6, "bfloat16": 1e-2}[case.dtype]
    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, atol=tolerance * abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", ["int8", "transposed-int8"])
def test_gradients_of_scales_and_rows_of_an_int8_matrix(name):
    case = CASES[name]
    lhs, rhs, sizes, scale = case.inputs()
    rhs = jnp.asarray(rhs, jnp.int8)

    def gradients(implementation):
        def loss(lhs, scale):
            return jnp.sum(jnp.sin(call(case, implementation)(lhs, rhs, sizes, rhs_scale=scale)))

        return jax.jit(jax.grad(loss, (0, 1)))(lhs, scale)

    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(abs(want).max()), rtol=0)


@functools.cache
def _compiled(rows: int, small: bool):
    """One program for all the sizes that hypothesis draws; few rows a group or many."""
    inner, columns, groups = 64, 6, 12 if small else 3
    random = np.random.default_rng(0)
    lhs = random.normal(size=(rows, inner)).astype(np.float32)
    rhs = random.normal(size=(groups, inner, columns)).astype(np.float32)
    return jax.jit(functools.partial(grouped_matmul, implementation="xla")), lhs, rhs


@given(data=st.data(), small=st.booleans())
def test_any_sizes(data, small):
    rows = 24 if small else 200
    run, lhs, rhs = _compiled(rows, small)
    cuts = data.draw(st.lists(st.integers(0, rows), min_size=len(rhs), max_size=len(rhs)).map(sorted))
    sizes = np.diff([0, *cuts]).astype(np.int32)
    lhs = np.where(np.arange(rows)[:, None] < cuts[-1], lhs, np.nan)
    rhs = np.where((sizes > 0)[:, None, None], rhs, np.nan)
    want, terms = expected(lhs, rhs, sizes, None, False)
    assert (abs(run(lhs, rhs, sizes) - want) <= 2e-6 * terms).all()


def test_sizes_beyond_the_rows_are_cut_off_under_jit():
    lhs, rhs = np.ones((6, 64), np.float32), np.ones((3, 64, 5), np.float32)
    got = jax.jit(grouped_matmul)(lhs, rhs, jnp.array([4, 100, 100], jnp.int32))
    np.testing.assert_allclose(got, np.full((6, 5), 64.0))


def test_under_vmap_and_scan():
    random = np.random.default_rng(0)
    lhs = random.normal(size=(3, 10, 64)).astype(np.float32)
    rhs = random.normal(size=(2, 4, 64, 8)).astype(np.float32)
    sizes = np.array([[1, 2, 3, 4], [10, 0, 0, 0], [0, 3, 0, 3]], np.int32)
    batched = jax.jit(jax.vmap(grouped_matmul, (0, None, 0)))(lhs, rhs[0], sizes)
    for got, x, s in zip(batched, lhs, sizes, strict=True):
        np.testing.assert_allclose(got, expected(x, rhs[0], s, None, False)[0], atol=1e-4)
    _, layers = jax.lax.scan(lambda c, w: (c, grouped_matmul(lhs[0], w, sizes[0])), 0, rhs)
    for got, w in zip(layers, rhs, strict=True):
        np.testing.assert_allclose(got, expected(lhs[0], w, sizes[0], None, False)[0], atol=1e-4)


@pytest.mark.parametrize("weight", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [8, 300])
@pytest.mark.parametrize("transpose", [False, True])
def test_narrow_matrices_are_not_widened_whole(weight, rows, transpose):
    groups, side = 32, 128
    scale = jnp.ones((groups, side)) if weight == "int8" else None
    run = jax.jit(functools.partial(grouped_matmul, transpose=transpose))
    program = run.lower(
        jnp.ones((rows, side)),
        jnp.ones((groups, side, side), weight),
        jnp.zeros(groups, jnp.int32),
        rhs_scale=scale,
    ).compile()
    assert program.memory_analysis().temp_size_in_bytes < groups * side * side


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_the_ragged_dot(platform):
    def loss(lhs, rhs, sizes):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes))

    arguments = jnp.ones((16, 64)), jnp.ones((4, 64, 8)), jnp.ones(4, jnp.int32)
    text = jax.export.export(jax.jit(jax.value_and_grad(loss, (0, 1))), platforms=[platform])(
        *arguments
    ).mlir_module()
    assert "while" not in text
    assert "ragged_dot" in text or "dot_general" in text


def refused(
    error, match, lhs=(4, 8), rhs=(3, 8, 5), sizes=(1, 1, 1), lhs_dtype="float32", dtype="float32", **options
):
    with pytest.raises(error, match=match):
        grouped_matmul(
            jnp.ones(lhs, lhs_dtype),
            jnp.ones(rhs, dtype),
            options.pop("array", jnp.array(sizes, jnp.int32)),
            **options,
        )


def test_what_does_not_fit_is_refused():
    refused(InputError, r"must agree in K", rhs=(3, 7, 5))
    refused(InputError, r"\[G, N, K\] with transpose=True", rhs=(3, 8, 5), transpose=True)
    refused(InputError, r"must be \[M, K\]", lhs=(4, 8, 1))
    refused(InputError, r"group_sizes.shape=\(2,\)", sizes=(1, 1))
    refused(InputError, "int32: cast it", array=jnp.ones(3))
    refused(InputError, "least -1", sizes=(-1, 1, 1))
    refused(InputError, "sum 9", sizes=(3, 3, 3))
    refused(InputError, "at least one group", rhs=(0, 8, 5), sizes=())
    refused(InputError, "rhs_scale missing", dtype="int8")
    refused(InputError, "rhs_scale given", rhs_scale=jnp.ones((3, 5)))
    refused(InputError, r"must be float32 \(3, 5\)", dtype="int8", rhs_scale=jnp.ones((3, 4)))
    refused(InputError, "implementation='fast'", implementation="fast")
    refused(UnsupportedError, "rhs.dtype=int32", dtype="int32")
    refused(UnsupportedError, "lhs.dtype=int32", lhs_dtype="int32")


def test_model_cases_are_named_once_and_add_up():
    assert len({case.name for case in MODELS}) == len(MODELS)
    assert all(sum(case.sizes) == case.rows for case in MODELS)
