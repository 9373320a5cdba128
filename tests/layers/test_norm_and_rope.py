"""Norms and ropes against their formulas in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.layers import (
    DynamicNTKRopeSpec,
    LayerNormSpec,
    LinearRopeSpec,
    Llama3RopeSpec,
    LongRopeSpec,
    RMSNormSpec,
    RopeSpec,
    YarnRopeSpec,
)
from jaxinf.layers.rope import alibi_slopes


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    x, norm = 3.0 * normal(0, 2, 5, 8), RMSNormSpec(eps=1e-2, offset=offset).build(8, dtype=jnp.float32)
    norm.scale[...] = normal(1, 8)
    x64 = np.asarray(x, np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-2) * (np.asarray(norm.scale[...]) + offset)
    np.testing.assert_allclose(norm(x), want, rtol=1e-5, atol=1e-6)


def test_layer_norm():
    x, norm = 3.0 * normal(0, 2, 5, 8) + 1.0, LayerNormSpec(eps=1e-2).build(8, dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = normal(1, 8), normal(2, 8)
    x64 = np.asarray(x, np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-2)
    want = want * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(x), want, rtol=1e-5, atol=1e-5)


def test_norms_work_in_float32_inside():
    """bfloat16 cannot hold 1000^2 + 1: the mean square must not be taken in it."""
    x = jnp.full((1, 8), 1000.0, jnp.bfloat16).at[0, 0].set(1.0)
    y = RMSNormSpec().build(8, dtype=jnp.bfloat16)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32)[0, 1:], math.sqrt(8 / 7), rtol=4e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_rope_turns_pairs_and_leaves_the_rest(interleaved, dim):
    rope = RopeSpec(dim, theta=100.0, interleaved=interleaved)
    x, positions = normal(0, 2, 3, 4, 8), jnp.asarray([[0, 1, 2, 3], [5, 6, 7, 8]], jnp.int32)
    got = np.asarray(rope.rotate(x, positions, positions[:, -1] + 1))
    want = np.array(x, np.float64)
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        angle = np.asarray(positions)[:, None, :] * 100.0 ** (-2 * i / dim)
        u, w = want[..., a].copy(), want[..., b].copy()
        want[..., a], want[..., b] = u * np.cos(angle) - w * np.sin(angle), w * np.cos(angle) + u * np.sin(angle)
    np.testing.assert_allclose(got, want, atol=1e-5)


ROPES = [
    RopeSpec(8),
    LinearRopeSpec(8, factor=4.0),
    Llama3RopeSpec(8, original_max=16),
    YarnRopeSpec(8, factor=4.0, original_max=16),
    DynamicNTKRopeSpec(8, factor=2.0, original_max=16),
    LongRopeSpec(8, short=(1.0, 1.1, 1.2, 1.3), long=(2.0, 3.0, 4.0, 5.0), original_max=16),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("total", [8, 40])
def test_scores_depend_on_distance_alone(rope, total):
    """<R(p) q, R(p - d) k> is the same for every p, at a given length of the row."""
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def score(at, distance):
        def turn(x, p):
            return rope.rotate(x, jnp.full((1, 1), p, jnp.int32), jnp.full((1,), total, jnp.int32))

        return float(jnp.sum(turn(q, at) * turn(k, at - distance)))

    assert score(3, 2) == pytest.approx(score(7, 2), abs=1e-4)
    assert score(3, 2) != pytest.approx(score(3, 1), abs=1e-4)


def test_dynamic_rope_is_the_plain_one_up_to_the_trained_length():
    rope = DynamicNTKRopeSpec(8, factor=2.0, original_max=16)
    np.testing.assert_allclose(
        rope.frequencies(jnp.asarray([16], jnp.int32))[0], RopeSpec(8).frequencies(jnp.asarray([16])), rtol=1e-5
    )


def test_yarn_ends_of_the_ramp():
    """The fastest channel is kept, the slowest interpolated; scores grow by the published factor."""
    rope = YarnRopeSpec(64, factor=8.0, original_max=4096)
    plain, scaled = np.asarray(RopeSpec(64).frequencies(None)), np.asarray(rope.frequencies(None))
    assert scaled[0] == pytest.approx(plain[0])
    assert scaled[-1] == pytest.approx(plain[-1] / 8)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(8.0) + 1.0)


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    extra = alibi_slopes(12)
    np.testing.assert_allclose(extra[:8], alibi_slopes(8))
    np.testing.assert_allclose(extra[8:], alibi_slopes(16)[::2][:4])


def test_ropes_that_follow_the_length_say_so():
    short, long = (jnp.asarray([n], jnp.int32) for n in (16, 40))
    for rope in ROPES:
        assert (rope.settled is not None) != np.allclose(rope.frequencies(short), rope.frequencies(long))
