"""GPTQ beside a brute-force reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.compression import gptq as module
from jaxinf.compression.gptq import errors, gptq

run = jax.jit(gptq, static_argnums=(3,), static_argnames=("act_order", "damping"))


def problem(seed: int, inner: int, columns: int, groups: int, lead: tuple[int, ...] = (), rank: int | None = None):
    """A matrix, the moments of correlated inputs of uneven sizes, and scales of groups."""
    random = np.random.default_rng(seed)
    w = random.normal(size=(*lead, inner, columns)).astype(np.float32)
    x = random.normal(size=(*lead, rank or 4 * inner, inner)) @ (
        random.normal(size=(inner, inner)) / 3 + np.eye(inner)
    )
    x *= np.exp(random.normal(size=inner))
    gram = np.swapaxes(x, -1, -2) @ x
    scales = abs(w).reshape(*lead, groups, -1, columns).max(-2) / 7.3  # no entry is at a tie
    return w, gram.astype(np.float32), scales


def brute_force(w, gram, scales, bits: int, act_order: bool, damping: float = 0.01) -> np.ndarray:
    """Row by row, with the inverse of the moments of the rows that are left computed anew, in float64."""
    w, gram = np.float64(w), np.float64(gram)
    inner = len(w)
    h = gram + damping * np.mean(np.diag(gram)) * np.eye(inner)
    steps = np.repeat(np.float64(scales), inner // len(scales), axis=0)
    left = list(np.argsort(-np.diag(gram), kind="stable") if act_order else range(inner))
    codes = np.zeros_like(w)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        i = left[0]
        codes[i] = np.clip(np.round(w[i] / steps[i]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        w[left] -= inverse[:, :1] / inverse[0, 0] * (w[i] - codes[i] * steps[i])
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("inner", "groups", "bits"), [(12, 1, 4), (12, 3, 4), (12, 4, 8)])
def test_codes_are_those_of_brute_force(inner, groups, bits, act_order):
    for seed in range(5):
        w, gram, scales = problem(seed, inner, 6, groups)
        scales = scales if bits == 4 else scales / 17
        found = run(w, gram, scales, bits, act_order=act_order)
        # A float32 sum may fall on the other side of a tie.
        assert np.mean(np.asarray(found) != brute_force(w, gram, scales, bits, act_order)) < 0.02


def test_blocks_of_rows_make_no_difference(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 10)  # rows: 9 at a time, which do not end where groups do
    w, gram, scales = problem(7, 36, 3, 2)
    found = jax.jit(lambda *of: gptq(*of, 4))(w, gram, scales)
    assert np.mean(np.asarray(found) != brute_force(w, gram, scales, 4, True)) < 0.02


def test_matrices_of_a_stack_are_by_themselves():
    w, gram, scales = problem(3, 12, 4, 2, lead=(3,))
    found = np.asarray(run(w, gram, scales, 4))
    expected = [brute_force(w[i], gram[i], scales[i], 4, True) for i in range(3)]
    assert np.mean(found != np.stack(expected)) < 0.02


def test_outputs_are_nearer_than_by_rounding_to_the_nearest():
    w, gram, scales = problem(5, 12, 6, 1)
    steps = np.repeat(scales, 12, axis=0)
    nearest = np.clip(np.round(w / steps), -8, 7)
    ours, theirs = (float(errors(jnp.asarray(w), q * steps, gram)) for q in (run(w, gram, scales, 4), nearest))
    assert ours < 0.5 * theirs


def test_channels_without_inputs_are_rounded_to_the_nearest():
    w, gram, scales = problem(1, 12, 6, 1)
    gram[3], gram[:, 3] = 0, 0
    found = np.asarray(run(w, gram, scales, 4))
    np.testing.assert_array_equal(found[3], np.clip(np.round(w[3] / scales[0]), -8, 7))
    assert np.isfinite(found).all()
    nothing = np.asarray(run(w, 0 * gram, scales, 4))
    np.testing.assert_array_equal(nothing, np.clip(np.round(w / scales), -8, 7))


def test_few_tokens_are_enough_to_factor():
    w, gram, scales = problem(2, 12, 6, 1, rank=2)
    assert np.isfinite(np.asarray(run(w, gram, scales, 4, damping=1e-12))).all()


def test_errors_are_those_of_the_outputs():
    random = np.random.default_rng(0)
    x, w, other = random.normal(size=(20, 6)), random.normal(size=(6, 3)), random.normal(size=(6, 3))
    found = errors(jnp.asarray(w), jnp.asarray(other), jnp.asarray(x.T @ x))
    np.testing.assert_allclose(found, np.sum((x @ (w - other)) ** 2), rtol=1e-5)
