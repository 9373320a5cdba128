"""Mixtures of experts against a loop over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.layers import ClampedGated, ExpertChoice, FFNSpec, Gated, MoESpec, Plain, TokenChoice
from pallas_kernels.errors import UnsupportedError

D, B, T = 16, 2, 7


def build(spec: MoESpec):
    layer = spec.build(D, rngs=nnx.Rngs(0), dtype=jnp.float32)
    keys = iter(jax.random.split(jax.random.key(1), 32))
    for path, value in nnx.iter_graph(layer):
        if isinstance(value, nnx.Param) and path[-1] in (
            "bias",
            "up_bias",
            "gate_bias",
            "down_bias",
            "selection_bias",
        ):
            value[...] = 0.3 * jax.random.normal(next(keys), value.shape)
    return layer, jax.random.normal(jax.random.key(2), (B, T, D))


def array(param):
    return np.asarray(param[...], np.float64)


def expert(layer, e, x):
    """One expert on one token, in float64."""
    w, spec = layer.experts, layer.spec

    def project(x, weight, bias):
        return x @ array(weight)[e] + (0.0 if bias is None else array(bias)[e])

    up = project(x, w.up, w.up_bias)
    gate = None if w.gate is None else jnp.asarray(project(x, w.gate, w.gate_bias))
    return project(np.asarray(spec.activation(jnp.asarray(up), gate)), w.down, w.down_bias)


TOKEN_CHOICE = {
    "renormalised": MoESpec(4, 8, TokenChoice(top_k=2)),
    "plain": MoESpec(4, 8, TokenChoice(top_k=3, normalise=False)),
    "one": MoESpec(4, 8, TokenChoice(top_k=1), activation=Plain("relu")),
    "sigmoid with bias": MoESpec(
        8, 8, TokenChoice(top_k=2, score="sigmoid", selection_bias=True, scale=2.5), shared=FFNSpec(8)
    ),
    "clamped": MoESpec(4, 8, TokenChoice(top_k=2, bias=True), activation=ClampedGated(limit=0.5), bias=True),
    "gated shared": MoESpec(4, 8, TokenChoice(top_k=2), Gated("gelu_tanh"), shared=FFNSpec(8), shared_gate=True),
}


@pytest.mark.parametrize("spec", TOKEN_CHOICE.values(), ids=TOKEN_CHOICE.keys())
def test_token_choice(spec):
    layer, x = build(spec)
    got, loss = layer(x)
    logits = np.asarray(x, np.float64) @ array(layer.router.kernel)
    if layer.router.bias is not None:
        logits = logits + array(layer.router.bias)
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = soft if spec.router.score == "softmax" else 1 / (1 + np.exp(-logits))
    ranked = scores if layer.selection_bias is None else scores + array(layer.selection_bias)
    want, counts = np.zeros((B, T, D)), np.zeros(spec.experts)
    for b in range(B):
        for t in range(T):
            chosen = np.argsort(-ranked[b, t])[: spec.router.top_k]
            weights = scores[b, t, chosen]
            if spec.router.normalise:
                weights = weights / weights.sum()
            for e, w in zip(chosen, weights * spec.router.scale, strict=True):
                want[b, t] += w * expert(layer, e, np.asarray(x[b, t], np.float64))
                counts[e] += 1
    if layer.shared is not None:
        shared = np.asarray(layer.shared(x)[0], np.float64)
        if layer.shared_gate is not None:
            shared = shared / (1 + np.exp(-np.asarray(x, np.float64) @ array(layer.shared_gate.kernel)))
        want += shared
    np.testing.assert_allclose(got, want, atol=2e-5)
    share = counts / counts.sum()
    assert float(loss) == pytest.approx(spec.experts * (share * soft.mean((0, 1))).sum(), abs=1e-4)


def test_a_balanced_router_has_loss_one():
    layer, x = build(MoESpec(4, 8, TokenChoice(top_k=4)))
    layer.router.kernel[...] = jnp.zeros_like(layer.router.kernel[...])
    assert float(layer(x)[1]) == pytest.approx(1.0)


@pytest.mark.parametrize("among", ["batch", "step"])
def test_expert_choice(among):
    spec = MoESpec(4, 8, ExpertChoice(capacity_factor=2.0, among=among))
    layer, x = build(spec)
    got, _ = layer(x)
    flat = np.asarray(x, np.float64).reshape(B * T, D)
    logits = flat @ array(layer.router.kernel)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    groups = [np.arange(B * T)] if among == "batch" else [np.arange(B) * T + t for t in range(T)]
    want = np.zeros((B * T, D))
    for group in groups:
        capacity = int(np.ceil(len(group) * 2.0 / 4))
        for e in range(4):
            for token in group[np.argsort(-scores[group, e])[:capacity]]:
                want[token] += scores[token, e] * expert(layer, e, flat[token])
    np.testing.assert_allclose(np.asarray(got).reshape(B * T, D), want, atol=2e-5)


def test_expert_choice_among_the_batch_cannot_generate():
    layer, x = build(MoESpec(4, 8, ExpertChoice()))
    with pytest.raises(UnsupportedError, match="sees later tokens"):
        layer(x, cached=True)
    step, x = build(MoESpec(4, 8, ExpertChoice(among="step")))
    whole, _ = step(x)
    column, _ = step(x[:, 3:4], cached=True)
    np.testing.assert_allclose(column, whole[:, 3:4], atol=1e-5)


def test_tokens_do_not_see_each_other():
    layer, x = build(TOKEN_CHOICE["renormalised"])
    whole, _ = layer(x)
    alone, _ = layer(x[1:, 2:3])
    np.testing.assert_allclose(alone, whole[1:, 2:3], atol=1e-5)
