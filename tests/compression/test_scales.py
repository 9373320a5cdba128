"""Scales that are searched, of groups and of channels."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.compression import awq, smoothquant
from jaxinf.compression.scales import blocks_of, searched
from jaxinf.quant.formats import joined, split, to_whole, whole_number_scales


def gram_of(seed: int, inner: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(50, inner)) * np.exp(np.random.default_rng(1).normal(size=inner))
    return (x.T @ x).astype(np.float32)


def test_blocks_are_cut_from_the_diagonal():
    gram = np.stack([gram_of(0, 12), gram_of(1, 12)])
    found = blocks_of(jnp.asarray(gram), 4)
    assert found.shape == (2, 3, 4, 4)
    for g in range(3):
        np.testing.assert_array_equal(found[:, g], gram[:, 4 * g : 4 * g + 4, 4 * g : 4 * g + 4])


@pytest.mark.parametrize("bits", [4, 8])
def test_no_group_loses_more_than_with_the_scale_of_its_weights_alone(bits):
    w = np.random.default_rng(2).standard_t(3, size=(32, 20)).astype(np.float32)
    gram = gram_of(3, 32)
    grouped, blocks = split(jnp.asarray(w), 8), blocks_of(jnp.asarray(gram), 8)

    def lost(scales):
        e = to_whole(grouped, scales[:, None, :], bits) * scales[:, None, :] - grouped
        return np.sum(e * (blocks @ e), axis=1)

    at = jnp.argmax(jnp.abs(grouped), axis=1, keepdims=True)
    plain = jnp.take_along_axis(grouped, at, axis=1)[:, 0] / -(2.0 ** (bits - 1))
    ours = lost(searched(jnp.asarray(w), jnp.asarray(gram), 8, bits))
    assert (ours <= lost(plain) * (1 + 1e-4)).all()
    assert ours.sum() < 0.98 * lost(whole_number_scales(grouped, bits)).sum() if bits == 4 else ours.sum() > 0


def test_zeros_have_finite_scales():
    steps = searched(jnp.zeros((8, 2)), jnp.eye(8), 4, 4)
    assert (joined(to_whole(split(jnp.zeros((8, 2)), 4), steps[:, None], 4)) == 0).all()
    assert np.isfinite(steps).all()


def test_candidates_begin_with_one_and_leave_idle_channels_alone():
    mean = jnp.asarray([[0.1, 1.0, 10.0, 0.0]])
    found = np.asarray(awq.candidates(mean))
    np.testing.assert_allclose(found[0], 1)
    np.testing.assert_allclose(found[:, 0, 3], 1)
    np.testing.assert_allclose(found[-1, 0, :3], [0.1, 1, 10], rtol=1e-5)


def test_smoothed_inputs_and_weights_meet_half_way():
    largest, rows = jnp.asarray([1.0, 16.0, 4.0, 0.0]), jnp.asarray([0.5, 0.1, 2.0, 1.0])
    s = smoothquant.scales(largest, rows, alpha=0.5)
    np.testing.assert_allclose((largest / s)[:3], (rows * s)[:3], rtol=1e-5)
    assert s[3] == 1
    np.testing.assert_allclose(smoothquant.scales(largest, rows, alpha=1.0)[:3], largest[:3], rtol=1e-6)
