"""Heads: what they compute, with and without a cache, and which model they belong to."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from jaxinf.checkpoint import load
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, QKNormSpec, RopeSpec
from jaxinf.models.drafting import EagleHead, EagleSpec, MedusaHeads, MedusaSpec, fingerprint, narrowed
from jaxinf.quant import QTensor
from pallas_kernels.errors import InputError

ROOT = Path(__file__).parents[3]
LAYER = LayerSpec(AttentionSpec(2, 1, 16, rope=RopeSpec(16), qk_norm=QKNormSpec()), FFNSpec(48))
SPEC = EagleSpec(32, LAYER, blocks=2, modules=2)


@pytest.fixture(scope="module")
def target():
    return tiny_models.model(tiny_models.spec(), seed=3)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(2, 7, 32)), jnp.float32),
        jnp.asarray(rng.integers(0, 64, (2, 7)), jnp.int32),
    )


@jax.jit
def alone(head, target, features, tokens):
    return [head(target, features, tokens, module=m)[0] for m in range(head.spec.modules)]


@jax.jit
def step(head, target, features, tokens, cache, counts):
    first = head(target, features, tokens, cache, counts=counts)
    return first, head(target, features, tokens, cache, counts=counts, module=1)


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_cache_changes_nothing(target, text, form):
    head = EagleHead(SPEC, rngs=nnx.Rngs(0))
    head = head if form is None else narrowed(head, form, dtype=jnp.float32)
    features, tokens = text
    want = alone(head, target, features, tokens)
    caches, outs = [head.init_cache(2, 8)] * 2, ([], [])
    # Row 1 waits a turn: its first column comes with row 0's second.
    for t in range(8):
        at = jnp.asarray([min(t, 6), max(t - 1, 0)])
        counts = jnp.asarray([t < 7, t > 0], jnp.int32)
        rows = jnp.arange(2)
        both = step(head, target, features[rows, at][:, None], tokens[rows, at][:, None], caches[0], counts)
        two = step(head, target, features[rows, at][:, None], tokens[rows, at][:, None], caches[1], counts)
        caches = [both[0][1], two[1][1]]
        for m, (out, _) in enumerate((both[0], two[1])):
            outs[m].append(out[:, 0])
    assert caches[0].lengths.tolist() == [7, 7]
    for m in (0, 1):
        got = jnp.stack(outs[m], 1)
        np.testing.assert_allclose(got[0, :7], want[m][0], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(got[1, 1:], want[m][1], atol=1e-5, rtol=1e-5)


def test_modules_have_weights_and_keys_of_their_own(target, text):
    head = EagleHead(SPEC, rngs=nnx.Rngs(0))
    one, two = alone(head, target, *text)
    assert not np.allclose(one, two)
    _, cache = head(target, *text, head.init_cache(2, 8), module=1)
    empty = head.init_cache(2, 8)
    same = [
        jax.tree.map(lambda a, b: np.array_equal(a, b), x, y)
        for x, y in zip(cache.layers, empty.layers, strict=True)
    ]
    assert all(jax.tree.leaves(same[0]))
    assert not any(jax.tree.leaves(same[1]))


def test_a_column_sees_what_came_before_and_its_own_token(target, text):
    head = EagleHead(replace(SPEC, modules=1), rngs=nnx.Rngs(0))
    features, tokens = text
    before = alone(head, target, features, tokens)[0]
    for change in ((features.at[:, 4].add(1.0), tokens), (features, tokens.at[:, 4].set(5))):
        after = alone(head, target, *change)[0]
        np.testing.assert_array_equal(after[:, :4], before[:, :4])
        assert np.abs(np.asarray(after - before))[:, 4:].max(-1).min() > 1e-4


@pytest.mark.parametrize("width", [None, 48])
def test_medusa_is_its_formula(text, width):
    heads = MedusaHeads(MedusaSpec(32, heads=3, blocks=2, width=width), rngs=nnx.Rngs(1))
    got = heads(text[0])
    assert got.shape == (3, 2, 7, 32)
    assert heads.dtype == jnp.float32
    for i, blocks in enumerate(heads.heads):
        x = np.asarray(text[0], np.float64)
        for block in blocks:
            first = block if width is None else block.up
            y = x @ np.asarray(first.kernel[...], np.float64) + np.asarray(first.bias[...], np.float64)
            y = y / (1 + np.exp(-y))
            x = x + (y if width is None else y @ np.asarray(block.down.kernel[...], np.float64))
        np.testing.assert_allclose(got[i], x, atol=1e-4, rtol=1e-4)


def test_matrices_are_rounded_and_nothing_else():
    head = narrowed(EagleHead(SPEC, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(head)):
        matrix = path[-1] == "kernel"
        assert isinstance(variable.get_value(), QTensor) == matrix, path
    assert head.dtype == jnp.bfloat16
    plain = narrowed(MedusaHeads(MedusaSpec(32), rngs=nnx.Rngs(0)), None)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(plain))} == {jnp.dtype(jnp.bfloat16)}


def test_what_does_not_fit_is_refused(target, text):
    head = EagleHead(SPEC, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"module=2 must be at least 0 and below modules=2"):
        head(target, *text, module=2)
    wide = EagleHead(replace(SPEC, d_model=64), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="d_model=64, but the target has 32"):
        wide(target, *text)
    for bad in (dict(blocks=0), dict(modules=0), dict(d_model=0)):
        with pytest.raises(InputError, match="must be at least 1"):
            replace(SPEC, **bad)
    with pytest.raises(InputError, match="heads=0 must be at least 1"):
        MedusaSpec(32, heads=0)


def test_a_fingerprint_is_of_the_model_not_of_its_form(target):
    ours = {
        fingerprint(load(ROOT / "tests" / "data" / "bfloat16" / "stdlib", dtype=dtype).model)
        for dtype in (None, "float32")
    }
    ours.add(fingerprint(load(ROOT / "jaxinf" / "embedded" / "stdlib", layout="stacked").model))
    assert len(ours) == 1
    others = {fingerprint(tiny_models.model(tiny_models.spec(), seed=seed)) for seed in (3, 4)}
    others.add(fingerprint(tiny_models.model(tiny_models.spec(window=9), seed=3)))
    assert len(others) == 3
    assert fingerprint(target) in others
    assert not ours & others


def test_heads_of_mixtures_are_heads_too(text, target):
    layer = replace(LAYER, ffn=MoESpec(2, 16))
    head = EagleHead(replace(SPEC, layer=layer, blocks=1, modules=1), rngs=nnx.Rngs(0))
    assert head(target, *text)[0].shape == (2, 7, 32)
