"""Rows through experts, all at once and in windows, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.layers import routing

EXPERTS, D = 5, 6


def compute(rows, sizes, owner):
    """Expert e gives `(e + 1) * row`, rows of none give 0, as `grouped_matmul` does."""
    real = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(real[:, None], rows * (owner[:, None] + 1), 0).astype(rows.dtype)


def case(rows: int, k: int, real: int, seed: int = 0):
    """Rows of which the first `real` have 1 to k experts; the others are NaN."""
    rng = np.random.default_rng(seed)
    local = np.full((rows, k), EXPERTS, np.int32)
    for row in local[:real]:
        held = rng.integers(1, k + 1)
        row[:held] = np.sort(rng.choice(EXPERTS, held, replace=False))
    x = rng.normal(size=(rows, D)).astype(np.float32)
    x[real:] = np.nan
    weights, bias = rng.normal(size=(rows, k)), rng.normal(size=(EXPERTS, D))
    want = np.zeros((rows, D))
    for r in range(real):
        for e, w in zip(local[r], weights[r], strict=True):
            if e < EXPERTS:
                want[r] += w * (x[r] * (e + 1) + bias[e])
    return x, local, weights.astype(np.float32), bias.astype(np.float32), want


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize(("rows", "k", "real"), [(1, 1, 1), (9, 3, 9), (9, 3, 4), (16, 5, 16), (8, 2, 0)])
def test_sums_of_rows(rows: int, k: int, real: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(routing, "CHUNK", chunk)
    x, local, weights, bias, want = case(rows, k, real)
    got = routing.by_rows(x, local, weights, compute, experts=EXPERTS, bias=bias)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("window", [5, 7, 64])
@pytest.mark.parametrize(("rows", "k", "real"), [(9, 3, 9), (9, 3, 4), (16, 5, 15), (8, 2, 0)])
def test_windows_of_rows(rows: int, k: int, real: int, window: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(routing, "CHUNK", chunk)
    x, local, weights, bias, want = case(rows, k, real)
    run = jax.jit(
        lambda *a: routing.in_windows(*a[:3], compute, experts=EXPERTS, bias=bias, count=a[3], window=window)
    )
    got = run(x.reshape(rows, 2, 3), local, weights, jnp.int32(real))
    assert got.shape == (rows, 2, 3)
    np.testing.assert_allclose(got.reshape(rows, D)[:real], want[:real], atol=1e-5)
    assert np.isnan(got[real:]).all()


def test_pairs_in_any_order() -> None:
    x, local, weights, bias, want = case(9, 3, 6)
    mixed = np.random.default_rng(1).permutation(local.size)
    token = np.repeat(np.arange(9, dtype=np.int32), 3)[mixed]
    owner, weight = local.reshape(-1)[mixed], weights.reshape(-1)[mixed]
    got = routing.by_pairs(x, token, owner, weight, compute, experts=EXPERTS, bias=bias)
    np.testing.assert_allclose(got, want, atol=1e-5)
