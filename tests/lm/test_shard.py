"""A model on every mesh of eight devices that divides it answers as it does on one."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf import LM
from jaxinf.layers import (
    AttentionSpec,
    ExpertChoice,
    FFNSpec,
    LayerSpec,
    MoESpec,
    QKNormSpec,
    RopeSpec,
    TokenChoice,
)
from jaxinf.models import CausalLM, ModelSpec, fold
from pallas_kernels.errors import InputError
from sharding import AXES, meshes

VOCAB = 101  # a prime: padded on every mesh
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5], [7, 8, 9, 3, 2, 1, 4, 77, 33, 2, 1, 44, 9, 9, 20, 21, 60]]
ROWS = [[(i * 37 + j * 11) % VOCAB for j in range(13)] for i in range(3)]
GREEDY = dict(max_new_tokens=32, temperature=0.0, eos=())
EIGHT = [
    ",".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True) if n > 1)
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if np.prod(sizes) == 8
]


def attention(window: int | None = None, kv_heads: int = 2, **more) -> AttentionSpec:
    return AttentionSpec(8, kv_heads, 8, rope=RopeSpec(8), window=window, **more)


def make(layers: list[LayerSpec], seed: int = 1, **more) -> LM:
    spec = ModelSpec(VOCAB, 32, fold(layers), 256, **more)
    model = CausalLM(spec, rngs=nnx.Rngs(seed), param_dtype=jnp.float32, layout="stacked")
    graph, state = nnx.split(model)
    # No parameter stays where it would hide a mistake: norms at 1, biases and sinks at 0.
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return LM(nnx.merge(graph, jax.tree.unflatten(tree, moved)))


def dense() -> LM:
    """Windows shorter and longer than a prompt's share of a chip, and none, eight times over; two key heads."""
    return make([LayerSpec(attention(6), FFNSpec(32)), LayerSpec(attention(), FFNSpec(32))] * 8, tied=True)


def mixture() -> LM:
    router = TokenChoice(top_k=2)
    return make([LayerSpec(attention(kv_heads=8), MoESpec(8, 16, router, shared=FFNSpec(16)))] * 8)


MODELS = dict(dense=dense, mixture=mixture)


@pytest.fixture(scope="module")
def alone() -> dict:
    """Each model with its logits and tokens on one device."""
    found = {}
    for name, build in MODELS.items():
        lm = build()
        tokens = [answer.tokens for answer in lm.generate(PROMPTS, **GREEDY)]
        found[name] = lm, np.asarray(lm.logits(ROWS)), tokens
    return found


def on(lm: LM, mesh: str) -> LM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mesh=.* takes the first")
        return lm.shard(mesh)


# One of each axis, and some together; the others are for the slow tests.
QUICK = {f"{axis}=8" for axis in AXES} | {"data=2,tensor=4", "pipeline=2,sequence=2,expert=2"}
MESHES = [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow) for mesh in EIGHT]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_of_eight(alone, name: str, mesh: str) -> None:
    lm, logits, tokens = alone[name]
    spread = on(lm, mesh)
    np.testing.assert_allclose(spread.logits(ROWS), logits, atol=1e-4)
    assert [answer.tokens for answer in spread.generate(PROMPTS, **GREEDY)] == tokens


NARROW = [
    ("int8", "data=2,tensor=4"),
    pytest.param("fp8", "sequence=2,tensor=4", marks=pytest.mark.slow),
    pytest.param("int4", "pipeline=2,data=2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "mesh"), NARROW)
def test_narrow_caches(alone, kind: str, mesh: str) -> None:
    """Windows and whole contexts; tokens are rounded alike wherever they lie."""
    lm, *_ = alone["dense"]
    want = [answer.tokens for answer in lm.generate(PROMPTS, **GREEDY, cache=kind)]
    assert [answer.tokens for answer in on(lm, mesh).generate(PROMPTS, **GREEDY, cache=kind)] == want


SPECIAL = {
    "norms over all heads, biases": [
        LayerSpec(attention(qk_norm=QKNormSpec(over="width"), qkv_bias=True, out_bias=True), FFNSpec(32, bias=True))
    ],
    "sinks and softcap": [LayerSpec(attention(9, kv_heads=4, sinks=True, softcap=5.0), FFNSpec(32))],
    "norms a head": [LayerSpec(attention(qk_norm=QKNormSpec(over="heads")), FFNSpec(32), placement="parallel")],
    "experts choose": [LayerSpec(attention(), MoESpec(4, 16, ExpertChoice(among="step")))],
}


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,sequence=2,tensor=2", "pipeline=2,expert=2,tensor=2"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_kinds_of_layers(kind: str, mesh: str) -> None:
    lm = make(SPECIAL[kind] * 2)
    spread = on(lm, mesh)
    rows = [*ROWS, ROWS[0][::-1]]  # experts that choose see rows that fill up a batch too, and four need none
    np.testing.assert_allclose(spread.logits(rows), lm.logits(rows), atol=1e-4)
    if kind != "experts choose":  # those see the other rows, and padding among them
        want = [answer.tokens for answer in lm.generate(PROMPTS, **GREEDY)]
        assert [answer.tokens for answer in spread.generate(PROMPTS, **GREEDY)] == want


def test_a_remainder_is_on_every_stage() -> None:
    layers = [LayerSpec(attention(6), FFNSpec(32)), LayerSpec(attention(), FFNSpec(32))] * 2
    lm = make([*layers, LayerSpec(attention(6), FFNSpec(48))])
    assert [s.repeats for s in lm.spec.segments] == [2, 1]
    spread = on(lm, "pipeline=2,data=2")
    want = [answer.tokens for answer in lm.generate(PROMPTS, **GREEDY)]
    assert [answer.tokens for answer in spread.generate(PROMPTS, **GREEDY)] == want


def test_sampling_is_the_same(alone) -> None:
    lm, *_ = alone["dense"]
    spread = on(lm, "data=2,tensor=4")

    def shift(logits, context):
        assert logits.shape[1] == VOCAB
        assert context.seen.shape[1] == VOCAB
        return logits.at[:, 3].add(0.5)

    options = dict(max_new_tokens=12, temperature=0.9, eos=(), seed=[3, 4, 5], logprobs=3)
    options |= dict(top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, logit_bias={7: 2.0, 100: -1.0})
    for more in ({}, dict(processors=(shift,))):
        for ours, alike in zip(
            spread.generate(PROMPTS, **options, **more), lm.generate(PROMPTS, **options, **more), strict=True
        ):
            assert ours.tokens == alike.tokens
            np.testing.assert_allclose(ours.logprobs, alike.logprobs, atol=1e-4)
            assert [list(top) for top in ours.top_logprobs] == [list(top) for top in alike.top_logprobs]


def test_samples_scores_and_windows(alone) -> None:
    lm, *_ = alone["dense"]
    spread = on(lm, "data=2,tensor=2,sequence=2")
    options = dict(max_new_tokens=8, temperature=1.0, eos=(), n=3)
    want = [[a.tokens for a in group] for group in lm.generate(PROMPTS, **options)]
    assert [[a.tokens for a in group] for group in spread.generate(PROMPTS, **options)] == want
    text = [(7 * i) % VOCAB for i in range(90)]
    np.testing.assert_allclose(spread.score(text).logprobs, lm.score(text).logprobs, atol=1e-4)
    bounded = dict(max_new_tokens=24, temperature=0.0, eos=(), window=8, sinks=2)
    want = [a.tokens for a in lm.generate(PROMPTS, **bounded)]
    assert [a.tokens for a in spread.generate(PROMPTS, **bounded)] == want
    pieces = list(spread.stream(PROMPTS[0], max_new_tokens=4, temperature=0.0, eos=()))
    assert isinstance(pieces, list)


def test_back_from_a_mesh(alone) -> None:
    """A model on a mesh can go to another, and to a single device."""
    lm, logits, _ = alone["dense"]
    spread = on(on(lm, "tensor=4,data=2"), "pipeline=2")
    np.testing.assert_allclose(spread.logits(ROWS), logits, atol=1e-4)
    assert meshes.describe(spread.mesh.shape) == "pipeline=2"


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=16", "needs 16 devices, but there are 8"),
        ("tensor=3", r"tensor=3 does not divide the model's heads=8.*tensor may be 1, 2, 4, 8"),
        ("tensors=2", "tensors"),
        ("tensor=2,tensor=4", "twice"),
        ("tensor=0", "whole number above 0"),
        ("tensor", "whole number above 0"),
    ],
)
def test_bad_meshes(alone, mesh: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        on(alone["dense"][0], mesh)


def test_a_smaller_mesh_says_so(alone) -> None:
    with pytest.warns(UserWarning, match="takes the first 2 of 8 devices"):
        alone["dense"][0].shard("tensor=2")


def test_auto_takes_all_devices(alone) -> None:
    spread = alone["dense"][0].shard("auto")
    assert spread.mesh.size == 8
