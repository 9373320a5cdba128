"""The distance of two models."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxinf.compression import divergence
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, Segment
from pallas_kernels.errors import InputError

ATTENTION = AttentionSpec(2, 2, 8, rope=RopeSpec(8))
LAYERS = (LayerSpec(ATTENTION, FFNSpec(16)), LayerSpec(ATTENTION, MoESpec(3, 16)))
SPEC = ModelSpec(32, 16, (Segment(LAYERS),), 64, tied=True, logit_softcap=30.0)
TOKENS = np.random.default_rng(0).integers(0, 32, (3, 7))


def model(seed: int) -> CausalLM:
    graph, state = nnx.split(CausalLM(SPEC, rngs=nnx.Rngs(seed)))
    return nnx.merge(graph, jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, state))


@pytest.fixture(scope="module")
def models() -> tuple[CausalLM, CausalLM]:
    return model(0), model(1)


def test_it_is_that_of_the_logits(models):
    p, q = (np.float64(jax.nn.log_softmax(jax.jit(lambda m, t: m(t))(m, TOKENS))) for m in models)
    found = divergence(*models, TOKENS, batch=2)
    assert found.kl == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), rel=1e-4)
    assert found.agreement == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))


def test_routing_may_be_the_same(models):
    first, second = models
    first_routed = nnx.merge(*nnx.split(first))
    first_routed.segments[0].blocks[1].ffn.router = second.segments[0].blocks[1].ffn.router
    assert divergence(first, first_routed, TOKENS, batch=2).kl > 1e-3
    assert divergence(first, first_routed, TOKENS, batch=2, same_routing=True).kl < 1e-6


def test_models_of_other_architectures_and_other_tokens_are_refused(models):
    other = CausalLM(ModelSpec(32, 16, (Segment(LAYERS[:1]),), 64), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="two models of one architecture"):
        divergence(models[0], other, TOKENS)
    with pytest.raises(InputError, match=r"shape \(7,\) must be \[rows, length\]"):
        divergence(*models, TOKENS[0])
