"""Whole models by calibrated schemes, on one tiny model and text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.compression import (
    SCHEMES,
    Calibration,
    Settings,
    divergence,
    outliers,
    plant_outliers,
    quantize,
    quantize_layer,
)
from jaxinf.compression.folding import weights_of
from jaxinf.compression.observing import run
from jaxinf.compression.schemes import plan
from jaxinf.compression.walking import Walk
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, Segment
from jaxinf.models.causal_lm import stack
from jaxinf.quant import FORMATS, QTensor, matmul
from pallas_kernels.errors import InputError

CALIBRATED = [name for name, scheme in SCHEMES.items() if scheme.calibrated]
D = 32
LAYER = LayerSpec(AttentionSpec(4, 2, 8, rope=RopeSpec(8)), FFNSpec(64))
SPEC = ModelSpec(64, D, (Segment((LAYER,), 2),), 64)
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 64, (24, 32))
OTHER = RANDOM.integers(0, 64, (4, 32))
TEXT = Calibration(TOKENS)


def made(spec=SPEC, gain: float = 3.0) -> CausalLM:
    """Random weights, wide enough that layers matter."""
    graph, state = nnx.split(CausalLM(spec, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda x: x * gain if x.ndim > 1 else x, state))


def stacked(model: CausalLM) -> CausalLM:
    other = nnx.eval_shape(lambda: CausalLM(model.spec, rngs=nnx.Rngs(0), layout="stacked"))
    for mine, its in zip(model.segments, other.segments, strict=True):
        its.blocks = nnx.List([stack(list(mine.blocks))])
    other.embed, other.final_norm, other.head = model.embed, model.final_norm, model.head
    return other


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return made()


@pytest.fixture(scope="module")
def quantised(model) -> dict[str, CausalLM]:
    return {name: quantize(model, name, calibration=TEXT, **more(name)) for name in CALIBRATED}


def more(scheme: str) -> dict:
    return dict(outliers=3) if scheme == "llm-int8" else dict(group=8) if scheme in ("awq", "gptq") else {}


def matrices(model: CausalLM) -> dict[str, QTensor]:
    found = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}
    return {name: value for name, value in found.items() if isinstance(value, QTensor)}


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_shapes_are_those_of_the_abstract_model(model, quantised, scheme):
    abstract = quantize(nnx.eval_shape(lambda: model), scheme, **more(scheme))
    expected, found = matrices(abstract), matrices(quantised[scheme])
    assert expected.keys() == found.keys()
    for name, q in found.items():
        assert jax.tree.map(lambda x: (x.shape, x.dtype), q) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected[name]
        )
        assert q.activations == expected[name].activations


def lost(model: CausalLM, other: CausalLM) -> float:
    """Mean square of what the first layer's outputs for the text are off by, with the same routing."""
    x = jnp.concatenate([jnp.asarray(x) for x in TEXT.hidden(model)])
    out, routing = run(Walk(model).block(0), x)
    return float(jnp.mean((run(Walk(other).block(0), x, routing)[0] - out) ** 2))


def test_what_calibration_gains(model, quantised):
    nearest = lost(model, quantize(model, "int4", group=8))
    # Inputs of a random model hardly depend on one another: that is the least that there is to gain.
    assert lost(model, quantised["gptq"]) < 0.8 * nearest
    assert lost(model, quantised["awq"]) < 0.9 * nearest
    assert lost(model, quantised["smoothquant"]) < 0.05 * nearest
    assert lost(model, model) == 0


@pytest.mark.slow
def test_outliers_that_were_planted(model):
    planted = plant_outliers(model, [3, 20])

    def kl(scheme, **options):
        return divergence(model, quantize(planted, scheme, calibration=TEXT, **options), OTHER).kl

    naive = kl("w8a8")
    assert kl("smoothquant") < 0.3 * naive
    assert kl("llm-int8") < 0.3 * naive
    assert kl("llm-int8") < 2 * kl("int8")


def test_stacked_layers_become_what_they_would_in_a_list(model, quantised):
    other = stacked(model)
    before = nnx.to_flat_state(nnx.state(other))
    of_list = {name: [weights_of(b)[name] for b in quantised["gptq"].segments[0].blocks] for name in ("ffn.down",)}
    found = weights_of(quantize(other, "gptq", calibration=TEXT, group=8).segments[0].blocks[0])
    for name, each in of_list.items():
        both = jax.tree.map(lambda *x: jnp.stack(x), *each)
        np.testing.assert_allclose(found[name].scales, both.scales, rtol=1e-4)
        assert np.mean(np.asarray(found[name].values != both.values)) < 0.02
    assert all(a[1] is b[1] for a, b in zip(before, nnx.to_flat_state(nnx.state(other)), strict=True))


def test_layers_of_a_stack_keep_as_many_rows_wide_as_the_one_with_most(model):
    walk, targets = Walk(stacked(model)), plan(model, "llm-int8")
    hidden = TEXT.hidden(model)
    for i, wide in enumerate((1, 4)):
        block, hidden = quantize_layer(
            walk.block(i), hidden, targets, at=f"layers.{i}.", settings=Settings(outliers=wide)
        )
        walk.put(i, block)
    rows = weights_of(walk.finished().segments[0].blocks[0])["ffn.up"].rows
    assert rows.shape == (2, 4)
    assert (np.asarray(rows[0]) >= 0).sum() == 1
    assert (np.asarray(rows[1]) >= 0).all()


def test_it_is_exact_when_every_channel_is_an_outlier(model):
    exact = quantize(model, "llm-int8", calibration=TEXT, threshold=0.0)
    assert matrices(exact)["segments.0.blocks.0.ffn.up.kernel"].outliers.shape == (D, 64)
    assert divergence(model, exact, OTHER).kl < 1e-8  # float32 sums in another order


def test_rows_kept_wide_are_multiplied_wide():
    w = jnp.asarray(RANDOM.normal(size=(2, 16, 5)), jnp.float32)
    q = outliers.keep_rows(w, jnp.asarray([[3, -1], [7, 0]], jnp.int32), FORMATS["int8"], 16)
    wide = q.dequantize()
    np.testing.assert_array_equal(wide[0, 3], w[0, 3])
    np.testing.assert_array_equal(wide[1, [7, 0]], w[1, [7, 0]])
    np.testing.assert_allclose(wide, w, atol=0.02)
    x = jnp.zeros((1, 16)).at[0, 3].set(1000.0).at[0, 5].set(1.0)
    one = dataclasses.replace(jax.tree.map(lambda a: a[0], q), activations="int8")
    np.testing.assert_allclose(matmul(x, one, out_dtype=jnp.float32), x @ wide[0], rtol=1e-5)


def test_rules_reach_calibrated_schemes(model):
    rules = {"*.attention.*": "keep", "*.down": "int8", "*.gate": "fp8_e4m3"}
    found = weights_of(quantize(model, "gptq", calibration=TEXT, rules=rules, group=8).segments[0].blocks[1])
    assert found["attention.out"].dtype == jnp.float32
    assert found["ffn.down"].values.dtype == jnp.int8
    assert found["ffn.gate"].values.dtype == jnp.float8_e4m3fn
    assert found["ffn.up"].values.dtype == jnp.int4


@pytest.mark.parametrize(("scheme", "part"), [("gptq", 0.8), pytest.param("awq", 0.95, marks=pytest.mark.slow)])
def test_experts_are_calibrated_with_the_tokens_that_they_serve(scheme, part):
    layer = LayerSpec(AttentionSpec(2, 2, 8, rope=RopeSpec(8)), MoESpec(3, 32))
    mixture = made(ModelSpec(64, D, (Segment((layer,)),), 64))
    other = quantize(mixture, scheme, calibration=TEXT, group=8)
    assert matrices(other)["segments.0.blocks.0.ffn.experts.down"].shape == (3, 32, D)
    assert lost(mixture, other) < part * lost(mixture, quantize(mixture, "int4", group=8))


def test_text_is_read_as_far_as_needed():
    def texts():
        yield "abc"
        yield "de"
        raise AssertionError("read too far")

    found = Calibration.of_texts(texts(), lambda text: [ord(c) for c in text], rows=2, length=2)
    np.testing.assert_array_equal(found.tokens, [[97, 98], [99, 100]])
    with pytest.raises(InputError, match="has 3 tokens, but 4 rows of 8 need 32"):
        Calibration.of_texts(["abc"], list, rows=4, length=8)


@pytest.mark.parametrize(
    ("scheme", "options", "says"),
    [
        ("gptq", {}, "gptq is calibrated with text: give calibration="),
        (
            "awq",
            dict(calibration=Calibration(TOKENS[:1])),
            "has 32 tokens, too few to tell 64 channels apart: give 64",
        ),
        ("awq", dict(calibration=Calibration(np.zeros((1, 99), int))), "cut them to 64 at most"),
        ("awq", dict(calibration=Calibration(TOKENS + 9)), "calibration tokens are 9 to 72; they must be 0 to 63"),
        ("awq", dict(calibration=TEXT, damping=0.0), r"damping=0\.0 must be above 0"),
        ("smoothquant", dict(calibration=TEXT, alpha=2), "alpha=2 must be between 0 and 1"),
        ("llm-int8", dict(calibration=TEXT, outliers=0), "outliers=0 must be at least 1"),
        ("awq", dict(calibration=TEXT, alfa=1), "alfa is no setting; there are alpha, threshold"),
    ],
)
def test_what_is_refused(model, scheme, options, says):
    with pytest.raises(InputError, match=says):
        quantize(model, scheme, **options)


def test_tokens_must_be_rows():
    with pytest.raises(InputError, match="must be integers"):
        Calibration(np.zeros(5, int))
    with pytest.raises(InputError, match="must be integers"):
        Calibration(np.zeros((2, 3)))


def poisoned(model: CausalLM, value: float) -> CausalLM:
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    up = other.segments[0].blocks[1].ffn.up
    up.kernel = nnx.Param(up.kernel[...].at[2, 3].set(value), **up.kernel.get_metadata())
    return other


@pytest.mark.parametrize(("scheme", "value"), [("int8", np.nan), ("gptq", -np.inf)])
def test_weights_that_are_not_finite_are_named(model, scheme, value):
    with pytest.raises(InputError, match=r"layers\.1\.ffn\.up holds NaN or infinite weights"):
        quantize(poisoned(model, value), scheme, calibration=TEXT)


@pytest.mark.parametrize("scheme", ["int8", "gptq"])
def test_a_quantised_model_is_refused(quantised, scheme):
    with pytest.raises(InputError, match="quantised already; take the original"):
        quantize(quantised["awq"], scheme, calibration=TEXT)


def test_progress_is_told(model):
    told = []
    quantize(model, "gptq", calibration=TEXT, group=8, progress=lambda *of: told.append(of))
    quantize(model, "int8", progress=lambda *of: told.append(of))
    assert told == [(1, 2), (2, 2), *((i, 14) for i in range(1, 15))]
