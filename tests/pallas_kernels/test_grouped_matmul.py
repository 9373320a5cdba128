"""The contract of `grouped_matmul`: every implementation at every small case, and what each promises."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import chips, grouped_matmul
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.grouped_matmul import blocks as sizes
from pallas_kernels.grouped_matmul.blocks import Blocks, Problem
from pallas_kernels.grouped_matmul.cases import MODELS, SMALL, Case
from pallas_kernels.grouped_matmul.kernel import plan

CASES = {case.name: case for case in SMALL}
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}


def expected(lhs, rhs, sizes, scale, transpose):
    """float64 products, and the sums of the absolute values of their terms, which rounding is relative to."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    rhs = rhs.swapaxes(1, 2) if transpose else rhs
    if scale is not None:
        scale = np.asarray(scale, np.float64).reshape(len(rhs), -1, rhs.shape[2])
        rhs = rhs * scale.repeat(rhs.shape[1] // scale.shape[1], 1)
    out, terms = np.zeros((2, len(lhs), rhs.shape[2]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row], terms[row] = lhs[row] @ rhs[group], abs(lhs[row]) @ abs(rhs[group])
    return out, terms


def poisoned(case: Case, seed=0):
    """Arguments with nan in what belongs to no group and in the matrices of empty groups, as jax arrays."""
    lhs, rhs, sizes, scale = case.inputs(seed)
    lhs[sizes.sum() :] = np.nan
    if scale is None:
        rhs[sizes == 0] = np.nan
    else:
        scale[sizes == 0] = np.nan
    return jnp.asarray(lhs, case.dtype), jnp.asarray(rhs).astype(case.weight), jnp.asarray(sizes), scale


def call(case, implementation, blocks=None):
    return functools.partial(grouped_matmul, transpose=case.transpose, blocks=blocks, implementation=implementation)


def check(case, implementation, blocks=None):
    lhs, rhs, sizes, scale = poisoned(case)
    got = jax.jit(call(case, implementation, blocks))(lhs, rhs, sizes, rhs_scale=scale)
    assert got.dtype == lhs.dtype
    want, terms = expected(lhs, rhs, sizes, scale, case.transpose)
    error = abs(np.asarray(got, np.float64) - want)
    # 16-bit activations may meet a weight with several scales a column that was rounded to their dtype.
    relative = 2e-6 + (ROUNDING[case.dtype] if case.scales > 1 and implementation != "reference" else 0)
    assert (error <= relative * terms + ROUNDING[case.dtype] * abs(want)).all(), error.max()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, implementation):
    check(CASES[name], implementation)


@pytest.mark.parametrize("name", [case.name for case in SMALL if case.dtype != "float16"])
def test_contract_of_the_kernel(name):
    check(CASES[name], "interpret")


# Several tiles along every axis, groups that span them, windows and tails that leave a tile.
_SIZES = (0, 37, 1, 0, 70, 3)
TILED = [
    (Case("tiled", 120, 768, 300, _SIZES), Blocks(m=32, n=128, k=256, rows=16, tail=8)),
    (Case("tiled-int8", 120, 128, 300, _SIZES, weight="int8"), Blocks(m=48, n=128, k=128, rows=32, tail=8)),
    (
        Case("tiled-transposed", 111, 512, 300, _SIZES, "bfloat16", "int8", True),
        Blocks(m=64, n=128, k=256, rows=48, tail=16),
    ),
    (
        Case("tiled-int4-parts", 60, 2048, 200, (0, 37, 1, 22), "bfloat16", "int4", scales=16),
        Blocks(m=32, n=128, k=1024, rows=16, tail=16),
    ),
    (
        Case("tiled-int8-small-parts", 60, 512, 200, (0, 37, 1, 22), weight="int8", scales=16),
        Blocks(m=32, n=128, k=256, rows=16, tail=8),
    ),
    (Case("one-tile", 120, 64, 260, _SIZES, "bfloat16", "bfloat16"), Blocks(m=128, n=260, k=64, rows=64, tail=64)),
]


@pytest.mark.parametrize(("case", "blocks"), TILED, ids=lambda value: getattr(value, "name", ""))
def test_tiles_of_the_kernel(case, blocks):
    check(case, "interpret", blocks)


def test_columns_are_taken_in_equal_shares(monkeypatch):
    monkeypatch.setattr(sizes, "UNROLLED", 256 * 64 * 256)
    blocks = Blocks(m=16, n=768, k=64, rows=16, tail=16)
    assert sizes.chunk(blocks, 16) == 256
    check(Case("shares", 16, 64, 768, (3, 13)), "interpret", blocks)
    check(Case("shares-transposed", 16, 64, 768, (3, 13), weight="int8", transpose=True), "interpret", blocks)


@given(
    rows=st.integers(1, 60),
    tile=st.sampled_from([8, 16, 32]),
    cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5).map(sorted),
)
@settings(deadline=None)
def test_the_plan_visits_every_row_once(rows, tile, cuts):
    group_sizes = np.diff([0, *cuts])
    visits = [np.asarray(a) for a in _planned(jnp.asarray(group_sizes, jnp.int32), rows, tile)]
    owner = np.repeat(np.arange(len(cuts)), group_sizes)[:rows]
    owner = np.concatenate([owner, np.full(rows - len(owner), -1)])
    seen = np.zeros(rows, int)
    previous = (-1, -1)
    for t, g, first, end, belongs in list(zip(*visits[:-1], strict=True))[: int(visits[-1])]:
        mine = np.arange(t * tile + first, t * tile + end)
        seen[mine] += 1
        assert 0 <= first < end <= tile
        assert (owner[mine] == (g if belongs else -1)).all()
        # In order, so that a tile and a matrix that were left are not copied again.
        assert (t, g) >= previous
        previous = (t, g)
    assert (seen == 1).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _planned(group_sizes, rows, tile):
    return plan(group_sizes, rows, tile)


GRADIENTS = ["empty-groups", "rows-left-over", "odd", "past-a-tile", "many-rows", "transposed", "bfloat16-many"]


# The backward pass is the same behind the kernel.
@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "xla") for name in GRADIENTS), ("empty-groups", "interpret")]
)
def test_gradients_match_the_reference(name, implementation):
    case = CASES[name]
    lhs, rhs, sizes, _ = poisoned(case)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.columns)), jnp.float32)

    def gradients(implementation):
        def loss(lhs, rhs):
            return jnp.vdot(call(case, implementation)(lhs, rhs, sizes).astype(jnp.float32), weights)

        return jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs)

    tolerance = {"float32": 5e-6, "bfloat16": 1e-2}[case.dtype]
    for got, want in zip(gradients(implementation), gradients("reference"), strict=True):
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
    """Programs for all the sizes that hypothesis draws, of XLA and of the kernel; few rows a group or many."""
    inner, columns, groups = 64, 6, 12 if small else 3
    random = np.random.default_rng(0)
    lhs = random.normal(size=(rows, inner)).astype(np.float32)
    rhs = random.normal(size=(groups, inner, columns)).astype(np.float32)
    blocks = Blocks(m=16 if small else 64, n=columns, k=inner, rows=16, tail=8)
    kernel = functools.partial(grouped_matmul, implementation="interpret", blocks=blocks)
    return (jax.jit(functools.partial(grouped_matmul, implementation="xla")), jax.jit(kernel)), lhs, rhs


@given(data=st.data(), small=st.booleans())
@settings(deadline=None)
def test_any_sizes(data, small):
    rows = 24 if small else 200
    runs, lhs, rhs = _compiled(rows, small)
    cuts = data.draw(st.lists(st.integers(0, rows), min_size=len(rhs), max_size=len(rhs)).map(sorted))
    sizes = np.diff([0, *cuts]).astype(np.int32)
    lhs = np.where(np.arange(rows)[:, None] < cuts[-1], lhs, np.nan)
    rhs = np.where((sizes > 0)[:, None, None], rhs, np.nan)
    want, terms = expected(lhs, rhs, sizes, None, False)
    for run in runs:
        assert (abs(run(lhs, rhs, sizes) - want) <= 2e-6 * terms).all()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_sizes_beyond_the_rows_are_cut_off_under_jit(implementation):
    lhs, rhs = np.ones((6, 64), np.float32), np.ones((3, 64, 5), np.float32)
    run = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    got = run(lhs, rhs, jnp.array([4, 100, 100], jnp.int32))
    np.testing.assert_allclose(got, np.full((6, 5), 64.0))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_under_vmap_and_scan(implementation):
    run = functools.partial(grouped_matmul, implementation=implementation)
    random = np.random.default_rng(0)
    lhs = random.normal(size=(3, 10, 64)).astype(np.float32)
    rhs = random.normal(size=(2, 4, 64, 8)).astype(np.float32)
    sizes = np.array([[1, 2, 3, 4], [10, 0, 0, 0], [0, 3, 0, 3]], np.int32)
    batched = jax.jit(jax.vmap(run, (0, None, 0)))(lhs, rhs[0], sizes)
    for got, x, s in zip(batched, lhs, sizes, strict=True):
        np.testing.assert_allclose(got, expected(x, rhs[0], s, None, False)[0], atol=1e-4)
    _, layers = jax.lax.scan(lambda c, w: (c, run(lhs[0], w, sizes[0])), 0, rhs)
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


def lowered(platform, dtype=jnp.float32):
    def loss(lhs, rhs, sizes):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes))

    arguments = jnp.ones((16, 64), dtype), jnp.ones((4, 64, 8), dtype), jnp.ones(4, jnp.int32)
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return jax.export.export(run, platforms=[platform])(*arguments).mlir_module()


def test_gpus_get_the_ragged_dot():
    text = lowered("cuda")
    assert "while" not in text
    assert "ragged_dot" in text or "dot_general" in text


def test_tpus_get_the_kernel():
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("tpu", jnp.float16)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "7x"])
def test_chosen_sizes_fit_and_divide(chip):
    chip = chips.find(chip)
    for case in MODELS:
        problem = Problem(
            case.rows, case.inner, case.columns, len(case.sizes), case.dtype, case.weight, case.transpose
        )
        chosen = sizes.heuristic(problem, chip)
        assert sizes.fits(problem, chosen, chip)
        assert not sizes.refusals(problem, chosen)


@given(
    rows=st.integers(1, 50000),
    inner=st.integers(1, 20000),
    columns=st.integers(1, 20000),
    groups=st.integers(1, 300),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    chip=st.sampled_from(["v5e", "v6e", "v5p", "7x"]),
)
@settings(max_examples=40, deadline=None)
def test_sizes_of_any_shape_fit_and_divide(rows, inner, columns, groups, dtype, chip):
    problem = Problem(rows, inner, columns, groups, dtype, dtype)
    chosen = sizes.heuristic(problem, chips.find(chip))
    assert sizes.fits(problem, chosen, chips.find(chip))
    assert not sizes.refusals(problem, chosen)


@pytest.mark.parametrize(
    ("shape", "blocks", "milliseconds"),
    [
        ((32768, 1920, 12160, 256), (256, 12160, 1920, 128, 128), 9.627),
        ((32768, 1920, 12160, 256), (512, 6144, 1920, 128, 128), 8.570),
        ((32768, 1920, 12160, 256), (2048, 6144, 1920, 256, 128), 8.049),
        ((32768, 2048, 7168, 256), (256, 7168, 2048, 128, 128), 5.617),
        ((32768, 2048, 7168, 256), (2048, 3584, 2048, 256, 128), 5.041),
        ((2048, 2048, 768, 128), (128, 768, 2048, 32, 32), 0.261),
    ],
)
def test_the_model_of_time_against_the_compiler_s_schedule(shape, blocks, milliseconds):
    """Many groups on v6e, bound by their matrices: tiles that cut few groups keep the copies going."""
    model = sizes.seconds(Problem(*shape, "bfloat16", "bfloat16"), Blocks(*blocks), chips.find("v6e"))
    assert model == pytest.approx(milliseconds / 1e3, rel=0.05)


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
    refused(InputError, r"an S that divides K=8", dtype="int4", rhs_scale=jnp.ones((3, 3, 5)))
    refused(InputError, r"must be float32 \[3, 5\] or \[3, S, 5\]", dtype="int8", rhs_scale=jnp.ones((3, 4)))
    refused(InputError, "implementation='fast'", implementation="fast")
    refused(UnsupportedError, "rhs.dtype=int32", dtype="int32")
    refused(UnsupportedError, "lhs.dtype=int32", lhs_dtype="int32")


def test_what_the_kernel_cannot_do_is_refused():
    options = {"implementation": "interpret"}
    refused(
        UnsupportedError,
        "lhs is float16, which .*; rhs is float16",
        lhs_dtype="float16",
        dtype="float16",
        **options,
    )
    refused(
        InputError, "m=16 must be a multiple of 8 up to 8; n=4 must be 5", blocks=Blocks(16, 4, 8, 8, 8), **options
    )
    with pytest.raises(InputError, match="every size must be 1 or more"):
        Blocks(8, 1, 1, 8, 0)
    with pytest.raises(InputError, match=r"need [\d.]+ MiB of VMEM in grouped_matmul, but a v5e has 115.2 MiB"):
        grouped_matmul(
            jnp.ones((4096, 8192)),
            jnp.ones((1, 8192, 512)),
            jnp.array([4096]),
            blocks=Blocks(4096, 512, 8192, 256, 256),
            implementation="pallas",
        )


def test_model_cases_are_named_once_and_add_up():
    assert len({case.name for case in MODELS}) == len(MODELS)
    assert all(sum(case.sizes) == case.rows for case in MODELS)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("name", ["empty-groups", "int8", "transposed-int8"])
def test_a_layer_of_stacked_matrices(implementation, name):
    case = CASES[name]
    lhs, rhs, sizes, scale = poisoned(case)
    others = jnp.full_like(rhs, 77)
    stacked = jnp.stack([others, rhs, others])
    scales = None if scale is None else jnp.stack([scale + 1, scale, scale + 1])
    run = jax.jit(lambda layer: call(case, implementation)(lhs, stacked, sizes, rhs_scale=scales, layer=layer))
    want = call(case, "reference")(lhs, rhs, sizes, rhs_scale=scale)
    np.testing.assert_allclose(run(1), want, rtol=1e-5, atol=1e-4)


def test_gradients_of_a_layer_of_stacked_matrices():
    case = CASES["empty-groups"]
    lhs, rhs, sizes, _ = (jnp.nan_to_num(x) if x is not None else x for x in poisoned(case))
    stacked = jnp.stack([rhs + 1, rhs])

    def loss(lhs, stacked, implementation):
        return jnp.sum(jnp.sin(grouped_matmul(lhs, stacked, sizes, layer=1, implementation=implementation)))

    for got, want in zip(
        *(jax.grad(loss, (0, 1))(lhs, stacked, form) for form in ("xla", "reference")), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not np.any(jax.grad(loss, 1)(lhs, stacked, "xla")[0])


def test_layers_that_do_not_fit_are_refused():
    lhs, rhs, sizes = jnp.ones((4, 8)), jnp.ones((2, 3, 8, 8)), jnp.array([1, 1, 2], jnp.int32)
    with pytest.raises(InputError, match="layer"):
        grouped_matmul(lhs, rhs, sizes)
    with pytest.raises(InputError, match="layer"):
        grouped_matmul(lhs, rhs[0], sizes, layer=0)
    with pytest.raises(InputError, match="stacks 2 layers"):
        grouped_matmul(lhs, rhs, sizes, layer=2)
    with pytest.raises(InputError, match="rhs_scale"):
        grouped_matmul(lhs, rhs.astype(jnp.int8), sizes, layer=1, rhs_scale=jnp.ones((3, 8)))
