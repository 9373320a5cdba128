"""Scales move, and what a layer computes stays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.compression import divergence, plant_outliers
from jaxinf.compression.folding import folds, weights_of, with_weights
from jaxinf.compression.observing import run, statistics
from jaxinf.compression.walking import Walk
from jaxinf.layers import AttentionSpec, Block, FFNSpec, LayerSpec, MoESpec, RMSNormSpec, RopeSpec
from jaxinf.layers.ffn import ClampedGated, Plain
from jaxinf.layers.norm import LayerNormSpec
from jaxinf.models import CausalLM, ModelSpec, Segment
from pallas_kernels.errors import InputError

D = 16
ATTENTION = AttentionSpec(4, 2, 4, rope=RopeSpec(4), qkv_bias=True)
PLAIN = LayerSpec(ATTENTION, FFNSpec(24, bias=True), RMSNormSpec(offset=1.0))
MIXTURE = MoESpec(3, 8, bias=True, shared=FFNSpec(8), shared_gate=True)
SPECS = {
    "pre, offset norm": PLAIN,
    "parallel, relu, LayerNorm": LayerSpec(ATTENTION, FFNSpec(24, Plain("relu")), LayerNormSpec(), "parallel"),
    "sandwich, mixture": LayerSpec(replace(ATTENTION, kv_heads=1), MIXTURE, placement="sandwich"),
}


def block(spec: LayerSpec, dtype=jnp.float32, seed: int = 0) -> Block:
    """Random, biases and norms too."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(spec, D, rngs=nnx.Rngs(seed), dtype=dtype)))
    random = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graph, noisy)


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_computes_the_same(name):
    spec, random = SPECS[name], np.random.default_rng(0)
    made = block(spec)
    x = jnp.asarray(random.normal(size=(2, 5, D)), jnp.float32)
    weights = weights_of(made)
    found, scales = folds(spec), []
    for fold in found:
        channels = weights[f"{fold.source}.scale"].shape if fold.kind == "norm" else weights[fold.source].shape
        lead = channels[:-2] if fold.kind == "columns" else ()
        scales.append(np.exp(random.normal(size=(*lead, channels[-1]))).astype(np.float32))

    @jax.jit
    def moved(weights, scales):
        for fold, s in zip(found, scales, strict=True):
            fold.apply(weights, s)
        return weights

    weights = moved(weights, scales)
    before, _ = run(made, x)
    after, _ = run(with_weights(made, weights), x)
    np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.max(jnp.abs(before))))
    changed = {name for name, w in weights.items() if not np.array_equal(w, weights_of(made)[name])}
    assert changed >= {n for fold in found for n in fold.into}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (PLAIN, ["attention_norm", "ffn_norm", "attention.value", "ffn.up"]),
        (replace(PLAIN, placement="parallel"), ["attention_norm", "attention.value", "ffn.up"]),
        (replace(PLAIN, placement="post"), ["attention.value", "ffn.up"]),
        (replace(PLAIN, placement="renormed"), ["attention.value", "ffn.up"]),
        (
            LayerSpec(replace(ATTENTION, clip=8.0), FFNSpec(24, Plain("gelu")), placement="parallel_two_norms"),
            ["attention_norm", "ffn_norm"],
        ),
        (LayerSpec(ATTENTION, FFNSpec(24, ClampedGated())), ["attention_norm", "ffn_norm", "attention.value"]),
        (
            LayerSpec(ATTENTION, MIXTURE),
            ["attention_norm", "ffn_norm", "attention.value", "ffn.experts.up", "ffn.shared.up"],
        ),
    ],
)
def test_where_folds_are(spec, expected):
    assert [fold.source for fold in folds(spec)] == expected


def test_routers_take_what_their_norm_gives_away():
    norm = folds(LayerSpec(ATTENTION, MIXTURE))[1]
    assert set(norm.into) >= {"ffn.router", "ffn.shared_gate", "ffn.experts.up", "ffn.shared.gate"}


def test_statistics_of_heads_that_share_a_value_are_gathered():
    fold = folds(PLAIN)[2]
    assert fold.repeat == (*range(4), *range(4), *range(4, 8), *range(4, 8))
    rows = jnp.arange(16.0)
    np.testing.assert_array_equal(fold.gather(rows, jnp.max), [4, 5, 6, 7, 12, 13, 14, 15])
    np.testing.assert_array_equal(fold.spread(jnp.arange(8)), fold.repeat)


def test_a_narrow_norm_holds_its_part_exactly():
    made = block(PLAIN, jnp.bfloat16)
    weights = weights_of(made)
    fold = folds(PLAIN)[0]
    s = fold.apply(weights, jnp.asarray(np.exp(np.random.default_rng(0).normal(size=D)), jnp.float32))
    scale = weights["attention_norm.scale"]
    assert scale.dtype == jnp.bfloat16
    old = weights_of(made)["attention_norm.scale"].astype(jnp.float32) + 1
    np.testing.assert_allclose((scale.astype(jnp.float32) + 1) * s, old, rtol=1e-6)


@pytest.mark.parametrize("layout", ["list", "stacked"])
def test_planted_outliers_change_inputs_and_nothing_else(layout):
    model = CausalLM(ModelSpec(32, D, (Segment((PLAIN,), 2),), 64), rngs=nnx.Rngs(0), layout=layout)
    planted = plant_outliers(model, [3, 7], factor=30)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 9))
    assert abs(divergence(model, planted, tokens).kl) < 1e-6
    x = [np.random.default_rng(1).normal(size=(2, 9, D)).astype(np.float32)]
    before, after = (
        statistics(Walk(m).block(1), x, gram=False)["attention.query"].largest for m in (model, planted)
    )
    expected = np.ones(D)
    expected[[3, 7]] = 30
    np.testing.assert_allclose(after / before, expected, rtol=1e-5)


def test_outliers_that_cannot_be_planted():
    spec = ModelSpec(32, D, (Segment((replace(PLAIN, placement="post"),)),), 64)
    with pytest.raises(InputError, match="no norm of the model"):
        plant_outliers(CausalLM(spec, rngs=nnx.Rngs(0)), [0])
    with pytest.raises(InputError, match=r"channels=\[16\] must be some of 0 to 15"):
        plant_outliers(CausalLM(spec, rngs=nnx.Rngs(0)), [16])
