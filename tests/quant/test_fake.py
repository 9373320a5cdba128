"""Training with rounding: whose gradients, and that what is finished computes as what was trained."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import mesh, over

from jaxinf.compression import BITNET, Rounding, finish_qat, quantize, start_qat
from jaxinf.core.stacked import Stacked
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, Segment
from jaxinf.models.placing import place_model
from jaxinf.quant import FakeQuant, QTensor, fake_quant, grouped, matmul, parts, rounded
from pallas_kernels.errors import InputError
from sharding.program import LOGITS, ROWS

product = jax.jit(partial(matmul, out_dtype=jnp.float32))
HOW = [
    ("int8", None, None),
    ("int4", 16, None),
    ("int4", 16, "int8"),
    ("ternary", None, "int8"),
    ("nf4", None, None),
]


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def to_bytes(x: jax.Array) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_gradients_are_those_of_a_product_of_the_rounded_numbers(how, dtype):
    x, w, dy = drawn(3, 5, 64).astype(dtype), fake_quant(drawn(64, 12), *how), drawn(3, 5, 12)
    y, pull = jax.vjp(product, x, w)
    dx, dw = pull(dy)
    q = jax.jit(rounded)(w)
    np.testing.assert_array_equal(y, product(x, q))
    assert isinstance(dw, FakeQuant)
    assert (dx.dtype, dw.values.dtype, y.dtype) == (dtype, jnp.float32, jnp.float32)
    seen = np.asarray(x, np.float32)
    seen = to_bytes(seen) if how[2] else seen
    loose = dict(rtol=1e-4, atol=1e-4) if dtype == jnp.float32 else dict(rtol=0.02, atol=0.2)
    np.testing.assert_allclose(y, seen @ np.asarray(q.dequantize()), **loose)
    np.testing.assert_allclose(dw.values, np.einsum("btk,btn->kn", seen, dy), **loose)
    np.testing.assert_allclose(np.float32(dx), np.asarray(dy) @ np.asarray(q.dequantize()).T, **loose)


@pytest.mark.parametrize("how", [("int8", None, None), ("int4", 16, None), ("ternary", None, "int8")], ids=str)
def test_experts_are_rounded_one_by_one_and_those_of_no_rows_learn_nothing(how):
    rows, w, sizes = drawn(6, 32), drawn(3, 32, 8) * jnp.asarray([1, 10, 0.1])[:, None, None], (4, 0, 2)
    w, counts = fake_quant(w, *how), jnp.asarray(sizes, jnp.int32)
    y, pull = jax.vjp(jax.jit(lambda rows, w: grouped(rows, w, counts)), rows, w)
    dw = pull(jnp.ones_like(y))[1].values
    at = 0
    for i, size in enumerate(sizes):
        own = fake_quant(w.values[i], *how)
        np.testing.assert_allclose(y[at : at + size], product(rows[at : at + size], own), rtol=1e-4, atol=1e-5)
        seen = to_bytes(rows[at : at + size]) if how[2] else rows[at : at + size]
        np.testing.assert_allclose(dw[i], jnp.broadcast_to(seen.sum(0)[:, None], (32, 8)), rtol=1e-4, atol=1e-4)
        at += size


@pytest.mark.parametrize("how", [("int4", 16, None), ("ternary", None, "int8")], ids=str)
def test_a_scan_over_stacked_matrices(how):
    """Each is rounded by itself, cut out by the scan or where it lies."""
    w, x = fake_quant(drawn(3, 32, 32), *how), drawn(4, 32)

    def run(w, x):
        def body(x, at):
            layer, own = at
            in_place = product(x, dataclasses.replace(w, values=Stacked(w.values, layer)))
            x = product(x, own)
            return x, jnp.max(jnp.abs(x - in_place))

        x, gaps = jax.lax.scan(body, x, (jnp.arange(3), w))
        return jnp.sum(x**2), gaps

    def unrolled(w, x):
        for i in range(3):
            x = product(x, dataclasses.replace(w, values=w.values[i]))
        return jnp.sum(x**2)

    (value, gaps), dw = jax.jit(jax.value_and_grad(run, has_aux=True))(w, x)
    want, dwant = jax.jit(jax.value_and_grad(unrolled))(w, x)
    assert not gaps.any()
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(dw.values, dwant.values, rtol=1e-3, atol=1e-3 * float(abs(dwant.values).max()))


GROUPS = [("int8", None), ("int4", 16), ("int4", 32), ("int4", 12), ("ternary", None)]


@pytest.mark.parametrize("axes", [("embed", "ffn"), ("ffn", "embed")])
@pytest.mark.parametrize("how", GROUPS, ids=str)
def test_a_chip_rounds_its_part_as_one_chip_rounds_the_whole(how, axes):
    """Groups that lie on one chip, on two, and on parts of two; and a scale of a whole matrix."""
    rows = 96 if how[1] == 12 else 64
    w = fake_quant(drawn(rows, 32), *how, axes=axes)
    spec = P(None, "tensor") if axes == ("embed", "ffn") else P("tensor", None)

    def run(w):
        return rounded(w).dequantize()

    got, want = over(mesh(tensor=4), run, spec, spec)(w), jax.jit(run)(w)
    # The largest entry of a column of int8 is half-way between two codes.
    np.testing.assert_allclose(abs(got - w.values), abs(want - w.values), rtol=1e-4, atol=1e-6)
    assert (abs(got - want) > 1e-6).mean() < 0.02


ATTENTION = AttentionSpec(4, 2, 8, rope=RopeSpec(8))
MIXTURE = MoESpec(2, 32, TokenChoice(top_k=1), shared=FFNSpec(64))
SPEC = ModelSpec(32, 32, (Segment((LayerSpec(ATTENTION, MIXTURE),), 2),), 64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 8)), jnp.int32)
logits = jax.jit(lambda model, tokens: model(tokens))


@jax.jit
def cached(model: CausalLM, tokens: jax.Array) -> jax.Array:
    hidden, _, _ = model.hidden(tokens, model.init_cache(2, 16), fresh=True)
    return model.logits(hidden)


@pytest.fixture(scope="module")
def stacked() -> CausalLM:
    return CausalLM(SPEC, rngs=nnx.Rngs(0), layout="stacked")


@pytest.mark.parametrize(
    ("rounding", "run", "ulps"), [(Rounding("int4", 16), cached, 0), (BITNET, logits, 64)], ids=["int4", "ternary"]
)
def test_a_finished_model_is_the_trained_one(stacked, rounding, run, ulps):
    """But for the last bit of a mean, which other programs sum in another order."""
    trained = start_qat(stacked, rounding)
    finished = finish_qat(trained)
    kinds = [type(v.get_value()) for _, v in nnx.to_flat_state(nnx.state(finished))]
    assert (kinds.count(QTensor), kinds.count(FakeQuant)) == (10, 0)
    got = run(trained, TOKENS)
    np.testing.assert_allclose(got, run(finished, TOKENS), rtol=0, atol=ulps * 2.0**-23)
    assert abs(got - run(stacked, TOKENS)).max() > 0.01


def test_on_a_mesh(stacked):
    model = start_qat(stacked, Rounding("ternary"))
    on = mesh(data=2, expert=2, tensor=2)
    graph, state = nnx.split(place_model(model, on))
    specs = jax.tree.map(lambda x: x.sharding.spec, state)
    program = over(on, lambda state, tokens: nnx.merge(graph, state)(tokens), (specs, ROWS), LOGITS)
    tokens = jnp.concatenate([TOKENS, (TOKENS + 1) % 32])
    np.testing.assert_allclose(program(state, tokens), logits(model, tokens), rtol=1e-3, atol=1e-4)


def test_it_is_one_plain_array_where_parameters_are_listed():
    w = fake_quant(drawn(32, 8), "int4", axes=("embed", "ffn"))
    assert [(n, v.shape, a) for n, v, a in parts(w, ("embed", "ffn"))] == [(None, (32, 8), ("embed", "ffn"))]
    assert w.group == 32
    abstract = nnx.eval_shape(lambda: CausalLM(SPEC, rngs=nnx.Rngs(0)))
    shapes = jax.tree.leaves(nnx.state(finish_qat(start_qat(abstract, BITNET))))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in shapes)
    assert sum(x.dtype == jnp.int2 for x in shapes) == 20


def test_what_cannot_be(stacked):
    with pytest.raises(InputError, match="'kmeans4' cannot be trained: choose one of int8, int4"):
        fake_quant(drawn(32, 8), "kmeans4")
    with pytest.raises(InputError, match="needs one of int8, int4, ternary, not nf4"):
        fake_quant(drawn(64, 8), "nf4", activations="int8")
    with pytest.raises(InputError, match="must be 'int8'"):
        fake_quant(drawn(64, 8), "int8", activations="int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"segments\.0\.blocks\.0\..*kernel: group=64 does not divide"):
        start_qat(stacked, Rounding("int4", 64))
    with pytest.raises(InputError, match="rounded already"):
        start_qat(start_qat(stacked, BITNET), BITNET)
    with pytest.raises(InputError, match="rounded already"):
        start_qat(quantize(stacked, "int8"), BITNET)
    with pytest.raises(InputError, match="was not trained with rounding"):
        finish_qat(stacked)
