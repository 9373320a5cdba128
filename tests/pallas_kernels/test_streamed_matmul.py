"""The contract of `streamed_matmul` and `fetch`: every implementation at every small case, and its promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import CHIPS
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.streamed_matmul import blocks as sizes
from pallas_kernels.streamed_matmul import fetch, kernel, streamed_matmul
from pallas_kernels.streamed_matmul.blocks import Blocks, Problem
from pallas_kernels.streamed_matmul.cases import MODELS, SMALL

CASES = {case.name: case for case in SMALL}
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8}
TILES = Blocks(128, 2)


def arguments(case):
    x, weights, scales = case.inputs()
    # Every layer but the one that is meant is poison, where the dtype has one.
    if case.layers is not None:
        for array in (*(scales or ()), *(w for w in weights if w.dtype != np.int8)):
            array[: case.layers - 1] = np.nan
    layer = None if case.layers is None else case.layers - 1
    return jnp.asarray(x, case.dtype), list(map(jnp.asarray, weights)), scales, layer


def check(case, got, x, weights, scales, layer) -> None:
    """Against products in float64, as close as the sums of absolute values of their terms allow."""
    for i, y in enumerate(got):
        assert y.dtype == (case.out or case.dtype)
        w = np.asarray(weights[i] if layer is None else weights[i][layer]).astype(np.float64)
        if scales is not None:
            w = w * np.asarray(scales[i] if layer is None else scales[i][layer], np.float64)
        rows = np.asarray(x, np.float64)
        want, terms = rows @ w, abs(rows) @ abs(w)
        rounding = ROUNDING[case.out or case.dtype]
        assert (abs(np.asarray(y, np.float64) - want) <= 2e-6 * terms + rounding * abs(want)).all()


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, implementation) -> None:
    case = CASES[name]
    x, weights, scales, layer = arguments(case)
    blocks = TILES if implementation == "interpret" else None
    call = partial(streamed_matmul, out_dtype=case.out, blocks=blocks, implementation=implementation)
    check(case, jax.jit(call)(x, weights, scales, layer=layer), x, weights, scales, layer)


@pytest.mark.parametrize("tiles", [1, 3, 4, 5, 100], ids=lambda n: f"{n}-tiles")
def test_what_was_fetched_is_used(tiles) -> None:
    """Of part of a weight, of a whole one, of several and of all."""
    case = CASES["three-weights"]
    x, weights, scales, layer = arguments(case)
    size = min(tiles, 3) * 128 * 256 + max(0, tiles - 3) * 128 * 128

    @jax.jit
    def run(x, weights, scales, layer):
        found, after = fetch(
            weights, x, rows=case.rows, size=size, layer=layer, blocks=TILES, implementation="interpret"
        )
        assert found is not None
        assert sum(found.tiles.counts) == min(tiles, 9)
        return streamed_matmul(after, weights, scales, layer=layer, fetched=found, implementation="interpret")

    check(case, run(x, weights, scales, layer), x, weights, scales, layer)


@pytest.mark.parametrize("early", [(0, 0), (1, 0), (3, 1), (3, 3)], ids=str)
def test_every_tile_is_awaited_before_it_is_read(early) -> None:
    """Both kernels' bodies as one kernel, where copies arrive when they are waited for and no sooner."""
    problem = Problem(8, 384, (128, 256), "float32", "int8", "float32")
    tiles = kernel.Tiles(problem, TILES, early)
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 384)).astype(np.float32)
    weights = [random.integers(-127, 128, (2, 384, n)).astype(np.int8) for n in problem.columns]
    buffers = [pltpu.VMEM(tiles.buffer(i), jnp.int8) for i in tiles.early]
    flags = [pltpu.SemaphoreType.DMA((tiles.counts[i],)) for i in tiles.early]

    def body(layer, x, *refs):
        weights, outs, rest = refs[:2], refs[2:4], refs[4:]
        n, late = len(tiles.early), len(tiles.late)
        buffers, flags, rings, rest = rest[:n], rest[n : 2 * n], rest[2 * n : 2 * n + late], rest[2 * n + late :]
        kernel.start(tiles, layer[0], [weights[i] for i in tiles.early], buffers, flags)
        products = kernel.Products(
            tiles, layer[0], x, weights, [], buffers, flags, outs, rings, rest[:2], [], *rest[2:]
        )
        products.run()

    hbm, vmem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)
    got = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((8, n), jnp.float32) for n in problem.columns],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), vmem, hbm, hbm],
        out_specs=[vmem, vmem],
        scratch_shapes=[*buffers, *flags, *kernel.scratch(tiles, jnp.int8)],
        interpret=pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan"),
    )(jnp.ones((1,), jnp.int32), x, *weights)
    for y, w in zip(got, weights, strict=True):
        np.testing.assert_allclose(y, x @ w[1].astype(np.float32), rtol=1e-4, atol=1e-2)


def test_where_nothing_can_be_fetched_the_products_stay() -> None:
    x = jnp.ones((4, 256))
    weights, scales = [jnp.ones((256, 128), jnp.int8)], [jnp.ones((128,))]
    found, after = fetch(weights, x, rows=4, size=1 << 20)  # a CPU
    assert found is None
    assert after is x
    found, _ = fetch(weights, x, rows=4, size=100, implementation="interpret")  # less than a tile
    assert found is None
    np.testing.assert_array_equal(streamed_matmul(x, weights, scales)[0], np.full((4, 128), 256.0))


def test_early_tiles_are_those_that_come_first() -> None:
    problem = Problem(8, 512, (256, 128), "bfloat16", "int8", "float32")
    tile = 128 * 256
    for size, counts in (
        (0, (0, 0)),
        (tile - 1, (0, 0)),
        (3 * tile, (3, 0)),
        (4 * tile, (4, 0)),
        (5 * tile, (4, 2)),
    ):
        assert sizes.ahead(problem, TILES, size) == counts


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_the_heuristic_fits(case) -> None:
    problem = Problem(case.rows, case.inner, case.columns, case.dtype, case.weight, case.out or case.dtype)
    for chip in (CHIPS["v5e"], CHIPS["v6e"], CHIPS["7x"]):
        chosen = sizes.heuristic(problem, chip)
        assert sizes.refusals(problem, chosen) == []
        assert sizes.unsupported(problem, chosen, chip) == []
        assert chosen in sizes.candidates(problem, chip) or chosen.ring > 4


X, W, S = jnp.ones((4, 256)), jnp.ones((256, 128), jnp.int8), jnp.ones((128,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: streamed_matmul(X, []), InputError, "weights is empty"),
        (lambda: streamed_matmul(X, [W]), InputError, "scales are needed"),
        (lambda: streamed_matmul(X, [W], [S, S]), InputError, "as many as weights"),
        (lambda: streamed_matmul(X, [W.astype(jnp.float32)], [S]), InputError, "only int8 weights"),
        (lambda: streamed_matmul(X[:, :128], [W], [S]), InputError, "K must be the same"),
        (lambda: streamed_matmul(X, [W, W[:128]], [S, S]), InputError, "differ in N alone"),
        (lambda: streamed_matmul(X, [W], [S], layer=1), InputError, "needs a layer"),
        (
            lambda: streamed_matmul(X, [W], [S], blocks=Blocks(96), implementation="interpret"),
            InputError,
            "must divide the 256 rows",
        ),
        (
            lambda: streamed_matmul(jnp.ones((300, 256)), [W], [S], implementation="interpret"),
            UnsupportedError,
            "300 rows",
        ),
        (
            lambda: streamed_matmul(X, [W[:, :100]], [S[:100]], implementation="interpret"),
            UnsupportedError,
            "multiples of 128",
        ),
        (
            lambda: streamed_matmul(
                X, [W], [S], fetched=fetch([W], X, rows=8, size=1 << 20, implementation="interpret")[0]
            ),
            InputError,
            "fetch what it uses",
        ),
    ],
)
def test_refusals(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
