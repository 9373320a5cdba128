"""Rows on their way to experts and back, with experts that are simple functions."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding import experts, meshes

CHIPS, N, D = 4, 6, 8


def run(chosen, weights, x, held: int, *, poison: bool = False):
    """`spread` on four chips, where expert e gives `(e + 1) * row + e`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = meshes.make(f"expert={CHIPS}")

    def serve(rows, local, weights, **window):
        behind = jnp.arange(rows.shape[0]) >= window.get("count", rows.shape[0])
        if poison:
            rows = jnp.where(behind.reshape(-1, *[1] * (rows.ndim - 1)), jnp.nan, rows)
        e = local + jax.lax.axis_index("expert") * held
        weights = jnp.where(local < held, weights, 0)
        scale, shift = (jnp.sum(weights * part, axis=1) for part in (e + 1, e))
        tail = [1] * (rows.ndim - 1)
        return rows * scale.reshape(-1, *tail) + shift.reshape(-1, *tail)

    def local(chosen, weights, x):
        return experts.spread(x, chosen, weights, CHIPS * held, serve)

    split = PartitionSpec("expert")
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False),
    )(chosen, weights, x)


def routes(k: int, total: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(total, k, replace=False) for _ in range(CHIPS * N)]).astype(np.int32)


LOADS = {
    "two of eight": lambda: (routes(2, 8, 0), 2),
    "more than chips": lambda: (routes(6, 8, 1), 2),
    "one each": lambda: (routes(1, 4, 2), 1),
    "all on one chip": lambda: (np.tile(np.int32([4, 5]), (CHIPS * N, 1)), 2),
    "none on the first": lambda: (routes(3, 6, 3) + 2, 2),
}


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("width", [D, 256, 1024])
def test_no_token_is_dropped_and_no_padding_is_read(load, width, exchanged, monkeypatch) -> None:
    monkeypatch.setattr(experts, "PLAN_BYTES", -1e12 if exchanged else 1e12)
    chosen, held = load()
    rng = np.random.default_rng(5)
    weights = rng.normal(size=chosen.shape).astype(np.float32)
    x = rng.normal(size=(len(chosen), width)).astype(np.float32)
    got = run(chosen, weights, x, held, poison=exchanged)
    scale, shift = (weights * (chosen + 1)).sum(1), (weights * chosen).sum(1)
    np.testing.assert_allclose(got, x * scale[:, None] + shift[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("total", "k", "chips"), [(8, 2, 4), (6, 3, 2), (8, 1, 8), (4, 4, 2), (4, 2, 1)])
def test_how_many_chips_a_token_reaches(total: int, k: int, chips: int) -> None:
    sets = list(itertools.combinations(range(total), k))
    mean = sum(len({e // (total // chips) for e in chosen}) for chosen in sets) / len(sets)
    assert experts.reached(total, k, chips) * chips == pytest.approx(mean)


def test_few_tokens_are_gathered_and_many_exchanged() -> None:
    model = dict(d=4096, itemsize=2, chips=8, experts=128, top_k=8)
    assert not experts.exchanges(4, **model)
    assert experts.exchanges(1024, **model)
    assert experts.gathered_bytes(4, 4096, 2, 8) == 4 * 7 * 4096 * (2 + 4)
    # Each of two experts of eight is on a chip of its own: 2/8 of the chips are reached.
    assert experts.exchanged_bytes(4, 4096, 2, 8, experts=8, top_k=2) == pytest.approx(2 * 4 * 7 / 4 * 4096 * 2)
