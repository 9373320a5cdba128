"""The contract of `quantized_matmul`: every implementation at every small case, and what each promises."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import chips, quantized_matmul
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.quantized_matmul import blocks as sizes
from pallas_kernels.quantized_matmul.blocks import Blocks, Problem
from pallas_kernels.quantized_matmul.cases import MODELS, SMALL, Case

CASES = {case.name: case for case in SMALL}
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}


def expected(x, w, scales, transpose, activations=None):
    """float64 products, and the sums of the absolute values of their terms, which rounding is relative to."""
    if activations:
        scale = np.abs(np.asarray(x, np.float32)).max(-1, keepdims=True) * np.float32(1 / 127)
        x = np.rint(np.asarray(x, np.float32) / scale) * scale.astype(np.float64)
    x, w = np.asarray(x, np.float64), np.asarray(w).astype(np.float64)
    w = w.T if transpose else w
    if scales is not None:
        scales = np.asarray(scales, np.float64).reshape(-1, w.shape[1])
        w = w * np.repeat(scales, len(w) // len(scales), axis=0)
    return x @ w, abs(x) @ abs(w)


def arguments(case, seed=0):
    x, w, scales = case.inputs(seed)
    return jnp.asarray(x, case.dtype), jnp.asarray(w), scales


def call(case, implementation, blocks=None):
    return functools.partial(
        quantized_matmul,
        transpose=case.transpose,
        activations=case.activations,
        out_dtype=case.out,
        blocks=blocks,
        implementation=implementation,
    )


def check(case, implementation, blocks=None):
    x, w, scales = arguments(case)
    got = jax.jit(call(case, implementation, blocks))(x, w, scales)
    assert got.dtype == (case.out or case.dtype)
    assert got.shape == (*case.lead, case.columns)
    want, terms = expected(x, w, scales, case.transpose, case.activations)
    error = abs(np.asarray(got, np.float64) - want)
    # 16-bit activations may meet a weight with several scales a column that was rounded to their dtype.
    rounded = case.groups > 1 and case.dtype != "float32" and implementation != "reference"
    relative = 2e-6 + (ROUNDING[case.dtype] if rounded else 0)
    assert (error <= relative * terms + ROUNDING[case.out or case.dtype] * abs(want)).all(), error.max()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, implementation):
    check(CASES[name], implementation)


def _interpreted():
    """The kernel's cases; each pair of plain dtypes in two shapes by default."""
    for case in SMALL:
        few = case.weight != case.dtype or "-odd" in case.name or "many-rows" in case.name
        if case.dtype != "float16":
            yield pytest.param(case.name, marks=() if few else pytest.mark.slow)


@pytest.mark.parametrize("name", list(_interpreted()))
def test_contract_of_the_kernel(name):
    check(CASES[name], "interpret")


# Several tiles along every axis, with a remainder in rows and columns.
TILED = [
    (Case("tiled", (3, 15), 768, 300, "float32", "int8"), Blocks(m=16, n=128, k=256, rows=8)),
    (Case("tiled-transposed", (45,), 768, 300, "bfloat16", "int8", True), Blocks(m=32, n=128, k=256, rows=16)),
    (Case("tiled-rows", (45,), 128, 600, "float32", "bfloat16"), Blocks(m=8, n=256, k=128, rows=8)),
    (Case("tiled-bytes", (45,), 512, 300, weight="int8", activations="int8"), Blocks(m=32, n=128, k=256, rows=32)),
    (
        Case("tiled-groups", (20,), 4096, 200, weight="int4", groups=32),
        Blocks(m=16, n=128, k=1024, rows=8),
    ),
    (
        Case("tiled-widened", (140,), 256, 300, "bfloat16", "int4", groups=2),
        Blocks(m=64, n=128, k=256, rows=32),
    ),
    (
        Case("tiled-widened-transposed", (300,), 512, 140, "bfloat16", "float8_e4m3fn", True),
        Blocks(m=256, n=128, k=256, rows=128),
    ),
]


@pytest.mark.parametrize(("case", "blocks"), TILED, ids=lambda value: getattr(value, "name", ""))
def test_tiles_of_the_kernel(case, blocks):
    check(case, "interpret", blocks)


GRADIENTS = [
    "float32-float32-odd",
    "float32-float32-many-rows-transposed",
    "float32-int8-one-row",
    "float32-int8-many-rows-transposed",
    "float32-bfloat16-three-rows",
    "bfloat16-bfloat16-many-rows",
    "bfloat16-int8-three-rows-transposed",
    "int4",
    "int4-groups-transposed",
    "fp8",
    "bytes",
    "bytes-int4-groups",
]


# The backward pass is the same behind the kernel.
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "xla") for name in GRADIENTS] + [(name, "interpret") for name in ("float32-int8-one-row", "bytes")],
)
def test_gradients_match_the_reference(name, implementation):
    case = CASES[name]
    x, w, scales = arguments(case)
    wanted = (0, 1) if scales is None else (0, 2)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*case.lead, case.columns)), jnp.float32)

    def gradients(implementation):
        def loss(x, w, scales):
            return jnp.vdot(call(case, implementation)(x, w, scales).astype(jnp.float32), weights)

        return jax.jit(jax.grad(loss, wanted))(x, w, scales)

    for got, want in zip(gradients(implementation), gradients("reference"), strict=True):
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


def lowered(platform, x, w, *scales, **options):
    run = jax.jit(functools.partial(quantized_matmul, **options))
    return jax.export.export(run, platforms=[platform])(x, w, *scales).mlir_module()


def test_gpus_get_one_dot_of_the_activations_dtype():
    text = lowered("cuda", jnp.ones((1, 256), jnp.bfloat16), jnp.ones((256, 512), jnp.int8), jnp.ones(512))
    assert text.count("stablehlo.dot_general") == 1
    assert "(tensor<1x256xbf16>, tensor<256x512xbf16>) -> tensor<1x512xf32>" in text
    assert "while" not in text


def test_tpus_get_the_kernel_for_narrow_weights_and_a_dot_for_others():
    x = jnp.ones((4, 256), jnp.bfloat16)
    narrow = lowered("tpu", x, jnp.ones((256, 512), jnp.int8), jnp.ones(512))
    assert "tpu_custom_call" in narrow
    assert "stablehlo.dot_general" not in narrow
    plain = lowered("tpu", x, jnp.ones((256, 512), jnp.bfloat16))
    assert "tpu_custom_call" not in plain
    assert plain.count("stablehlo.dot_general") == 1
    asked = lowered("tpu", x, jnp.ones((256, 512), jnp.bfloat16), implementation="pallas")
    assert "tpu_custom_call" in asked
    few = lowered("tpu", x, jnp.ones((256, 512), jnp.float8_e4m3fn), jnp.ones(512))
    assert "tpu_custom_call" not in few
    half = lowered("tpu", x.astype(jnp.float16), jnp.ones((256, 512), jnp.int8), jnp.ones(512))
    assert "tpu_custom_call" not in half


def test_float32_products_have_the_highest_precision_everywhere():
    text = lowered("tpu", jnp.ones((4, 256)), jnp.ones((256, 512)))
    assert "precision = [HIGHEST, HIGHEST]" in text


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_activations_are_rounded_by_row(implementation):
    x = jnp.array([[127.0, 0.4, -63.6], [0.0, 0.0, 0.0], [1e-3, -1e-3, 5e-4]])
    got = quantized_matmul(
        x, jnp.eye(3, dtype=jnp.int8), jnp.ones(3), activations="int8", implementation=implementation
    )
    want = [[127, 0, -64], [0, 0, 0], [1e-3, -1e-3, 64e-3 / 127]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_every_value_of_float8_and_int4(implementation):
    codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    codes = codes[np.isfinite(codes)]
    for values, dtype in ((codes, jnp.float8_e4m3fn), (np.arange(-8, 8, dtype=np.float32), jnp.int4)):
        w = jnp.asarray(np.diag(values)).astype(dtype)
        got = quantized_matmul(jnp.ones((1, len(values))), w, jnp.ones(len(values)), implementation=implementation)
        np.testing.assert_array_equal(got[0], values)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "7x"])
def test_chosen_sizes_fit_and_divide(chip):
    chip = chips.find(chip)
    for case in MODELS:
        x = "int8" if case.activations else case.dtype
        groups = 0 if case.weight == "bfloat16" else case.groups
        problem = Problem(case.lead[0], case.inner, case.columns, x, case.weight, case.dtype, groups)
        chosen = sizes.heuristic(problem, chip)
        assert sizes.fits(problem, chosen, chip)
        assert not sizes.refusals(problem, chosen)


@given(
    rows=st.integers(1, 5000),
    inner=st.integers(1, 20000),
    columns=st.integers(1, 40000),
    x=st.sampled_from(["float32", "bfloat16", "int8"]),
    w=st.sampled_from(["int8", "int4"]),
    chip=st.sampled_from(["v5e", "v6e", "v5p", "7x"]),
)
@settings(max_examples=40, deadline=None)
def test_sizes_of_any_shape_fit_and_divide(rows, inner, columns, x, w, chip):
    problem = Problem(rows, inner, columns, x, w, "float32", 1)
    chosen = sizes.heuristic(problem, chips.find(chip))
    assert sizes.fits(problem, chosen, chips.find(chip))
    assert not sizes.refusals(problem, chosen)


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
    refused(InputError, "scales missing", dtype="int4")
    refused(InputError, "which must divide K=8", dtype="int8", scales=jnp.ones((3, 5)))
    refused(InputError, "activations='int4' is unknown", dtype="int8", scales=jnp.ones(5), activations="int4")
    refused(InputError, "int8, int4 or int2 weight only", activations="int8")
    refused(UnsupportedError, "w.dtype=int16", dtype="int16")
    refused(UnsupportedError, "w.dtype=int32", dtype="int32")
    refused(UnsupportedError, "int32 is not served", x_dtype="int32")
    refused(UnsupportedError, "int32 is not served", out_dtype="int32")


def test_what_the_kernel_cannot_do_is_refused():
    options = {"dtype": "int8", "scales": jnp.ones(5), "implementation": "interpret"}
    refused(UnsupportedError, "x is float16.*out_dtype is float16", x_dtype="float16", **options)
    refused(InputError, "m=3 must be 2 .*; rows=2 must divide m=3", blocks=Blocks(3, 5, 8, 2), **options)
    with pytest.raises(InputError, match="every size must be 1 or more"):
        Blocks(0, 1, 1, 1)
    with pytest.raises(InputError, match=r"need [\d.]+ MiB of VMEM in quantized_matmul, but a v5e has 115.2 MiB"):
        quantized_matmul(
            jnp.ones((4096, 8192)),
            jnp.ones((8192, 4096), jnp.int8),
            jnp.ones(4096),
            blocks=Blocks(4096, 4096, 8192, 4096),
            implementation="pallas",
        )


def test_a_contraction_that_no_sizes_fit_goes_to_xla():
    x, w, scales = jnp.zeros((8, 99_991)), jnp.zeros((99_991, 4), jnp.int8), jnp.ones(4)
    assert "tpu_custom_call" not in lowered("tpu", x, w, scales)
    with pytest.raises(UnsupportedError, match=r"need at least [\d.]+ MiB of VMEM, but a v5e has 115.2 MiB"):
        quantized_matmul(x, w, scales, implementation="pallas")


def test_model_cases_are_named_once():
    assert len({case.name for case in MODELS}) == len(MODELS)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_a_layer_of_a_stack(implementation, transpose, groups) -> None:
    """The layer's own product, the other layers poisoned where a dtype has NaN: scales."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, 256))
    w = jax.random.randint(keys[1], (3, 128, 256) if transpose else (3, 256, 128), -127, 128, jnp.int8)
    scales = jax.random.uniform(keys[2], (3, 128) if groups is None else (3, groups, 128))
    options = dict(transpose=transpose, implementation=implementation)
    want = quantized_matmul(x, w[1], scales[1], **options)
    poisoned = scales.at[0].set(jnp.nan).at[2].set(jnp.nan)
    got = jax.jit(lambda layer: quantized_matmul(x, w, poisoned, layer=layer, **options))(1)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * float(jnp.abs(want).max()))
    with pytest.raises(InputError, match="layer"):
        quantized_matmul(x, w, scales, **options)
    with pytest.raises(InputError, match="stacks 3 layers"):
        quantized_matmul(x, w, scales, layer=3, **options)


def test_gradients_of_a_layer_of_a_stack() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 32))
    w = jax.random.normal(jax.random.key(1), (3, 32, 16))

    def loss(x, w, layer=None):
        return jnp.sum(quantized_matmul(x, w, layer=layer) ** 2)

    dx, dw = jax.grad(loss, (0, 1))(x, w, 2)
    want_x, want_w = jax.grad(loss, (0, 1))(x, w[2])
    np.testing.assert_allclose(dx, want_x, rtol=1e-6)
    np.testing.assert_allclose(dw[2], want_w, rtol=1e-6)
    assert not np.any(dw[:2])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("dtype", "entries"), [("uint4", 16), ("uint4", 5), ("uint8", 40), ("int2", None), ("float8_e5m2", None)]
)
def test_formats_of_the_xla_form(dtype, entries, transpose):
    """Codes with a codebook and dtypes without a kernel: a stack's layer, one row and many, some groups."""
    random = np.random.default_rng(0)
    shape = (3, 96, 64) if transpose else (3, 64, 96)
    if entries:
        w = jnp.asarray(random.integers(0, entries, shape), dtype)
    else:
        w = jnp.asarray(random.integers(-1, 2, shape), dtype)
    codebook = jnp.asarray(random.normal(size=(3, entries)), jnp.float32) if entries else None
    run = functools.partial(quantized_matmul, transpose=transpose)
    for groups, rows in ((1, 1), (4, 3), (2, 40)):
        x = jnp.asarray(random.normal(size=(rows, 64)), jnp.float32)
        scales = jnp.asarray(random.uniform(0.5, 1, (3, groups, 96)), jnp.float32)
        got = jax.jit(run)(x, w, scales, codebook, layer=1)
        wide = w.astype(jnp.float32) if codebook is None else jax.vmap(lambda c, q: c[q])(codebook, w.astype(int))
        want, terms = expected(x, wide[1], scales[1], transpose)
        assert (abs(got - want) <= 2e-6 * terms).all()
        plain = run(x, w, scales, codebook, layer=1, implementation="reference")
        assert (abs(plain - want) <= 2e-6 * terms).all()
        one = scales[1], None if codebook is None else codebook[1]
        slope = jax.jit(jax.grad(lambda x, w, s, c: run(x, w, s, c).sum()))(x, w[1], *one)
        columns = (wide[1].T if transpose else wide[1]) * jnp.repeat(scales[1], 64 // groups, axis=0)
        np.testing.assert_allclose(slope, jnp.broadcast_to(columns.sum(1), x.shape), rtol=1e-5, atol=1e-5)


def test_bad_codebooks():
    x, w, scales = jnp.ones((2, 8)), jnp.zeros((8, 4), jnp.uint4), jnp.ones(4)
    with pytest.raises(InputError, match="codebook missing"):
        quantized_matmul(x, w, scales)
    with pytest.raises(InputError, match="codebook given"):
        quantized_matmul(x, w.astype(jnp.int8), scales, jnp.ones(16))
    with pytest.raises(InputError, match="1 to 16 entries"):
        quantized_matmul(x, w, scales, jnp.ones(17))
    with pytest.raises(UnsupportedError, match="only the XLA form looks up"):
        quantized_matmul(x, w, scales, jnp.ones(16), implementation="interpret")
    with pytest.raises(UnsupportedError, match="only the XLA form widens"):
        quantized_matmul(x, w.astype(jnp.int2), scales, implementation="interpret")
