"""Heads that every chip has whole draft beside a target that a mesh splits."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf import LM
from jaxinf.generation.speculative import Drafter, Eagle, EagleTree, Medusa, best_paths
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, fold
from jaxinf.models.drafting import EagleHead, EagleSpec, MedusaHeads, MedusaSpec, fingerprint

PROMPTS = [[1, 2, 3, 4, 5, 6], [5], [7, 8, 9, 3, 2]]


def head(modules: int = 1) -> EagleHead:
    # Of other sizes than the target's layers, which four chips would not divide.
    layer = LayerSpec(AttentionSpec(3, 1, 8, rope=RopeSpec(8)), FFNSpec(25))
    return EagleHead(EagleSpec(32, layer, modules=modules), rngs=nnx.Rngs(3))


DRAFTERS: dict[str, Drafter] = {
    "eagle tree": EagleTree(head(), 5, levels=3, width=2),
    "mtp": Eagle(head(2), 3),
    "medusa": Medusa(MedusaHeads(MedusaSpec(32), rngs=nnx.Rngs(3)), best_paths([[0.5, 0.3], [0.4, 0.2]], 5)),
}


@pytest.fixture(scope="module")
def target() -> LM:
    layers = [LayerSpec(AttentionSpec(4, 2, 8, rope=RopeSpec(8), window=w), FFNSpec(32)) for w in (6, None)]
    model = CausalLM(ModelSpec(11, 32, fold(layers), 128), rngs=nnx.Rngs(1), layout="stacked")
    graph, state = nnx.split(model)
    return LM(nnx.merge(graph, jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, state)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("eagle tree", "data=2,tensor=4"), ("mtp", "tensor=2,expert=2"), ("medusa", "data=2,tensor=4")],
)
def test_answers_are_those_of_one_chip(target: LM, name: str, mesh: str) -> None:
    options = dict(max_new_tokens=12, temperature=0.0, eos=())
    want = [answer.tokens for answer in target.generate(PROMPTS, **options)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mesh=.* takes the first")
        spread = target.shard(mesh)
    assert fingerprint(spread.model) == fingerprint(target.model)
    answers = spread.with_drafter(DRAFTERS[name], adaptive=False).generate(PROMPTS, **options)
    assert [answer.tokens for answer in answers] == want
    one = target.with_drafter(DRAFTERS[name], adaptive=False).generate(PROMPTS, **options)
    passes = [[a.stats.tokens_per_pass for a in some] for some in (answers, one)]
    np.testing.assert_allclose(*passes)
    assert max(passes[0]) > 1.0
    assert jnp.isfinite(jnp.asarray(passes)).all()
