"""What is noted of a block's inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.compression.observing import Stats, _step, observe, run, statistics
from jaxinf.layers import AttentionSpec, Block, FFNSpec, LayerSpec, MoESpec, RopeSpec
from jaxinf.layers.moe import TokenChoice
from pallas_kernels.errors import InputError

D = 16
ATTENTION = AttentionSpec(4, 2, 4, rope=RopeSpec(4))
MIXTURE = MoESpec(3, 8, router=TokenChoice(top_k=2), bias=True, shared=FFNSpec(8))


@pytest.fixture(scope="module")
def mixture() -> Block:
    return Block(LayerSpec(ATTENTION, MIXTURE), D, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.fixture(scope="module")
def hidden() -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(2, 2, 6, D)).astype(np.float32))


def test_inputs_of_a_mixture(mixture, hidden):
    out, found = observe(mixture, jnp.asarray(hidden[0]), gram=True)
    np.testing.assert_allclose(out, run(mixture, jnp.asarray(hidden[0]))[0], atol=1e-5)
    assert ("attention.query", "attention.key", "attention.value") in found
    assert ("ffn.experts.up", "ffn.experts.gate") in found
    assert ("ffn.shared.up", "ffn.shared.gate") in found
    assert len(found) == 6

    inputs = np.asarray(mixture.attention_norm(jnp.asarray(hidden[0]))).reshape(-1, D)
    stats = found["attention.query", "attention.key", "attention.value"]
    check(stats, inputs)

    # By hand: the tokens of each expert, and what its last matrix gets of them.
    x = jnp.asarray(hidden[0])
    x = x + mixture.attention(mixture.attention_norm(x), _step(x), None)[0]
    h = mixture.ffn_norm(x).reshape(-1, D)
    chosen = np.argsort(-np.asarray(mixture.ffn.router(h)), axis=1)[:, :2]
    experts = mixture.ffn.experts
    for e in range(3):
        own = h[np.any(chosen == e, axis=1)]
        check(entry(found["ffn.experts.up", "ffn.experts.gate"], e), np.asarray(own))
        up, gate = (
            own @ w[e] + b[e] for w, b in ((experts.up, experts.up_bias), (experts.gate, experts.gate_bias))
        )
        check(entry(found["ffn.experts.down",], e), np.asarray(experts.activation(up, gate)))


def entry(stats: Stats, e: int) -> Stats:
    assert stats.gram is not None
    return Stats(stats.count[e], stats.largest[e], stats.total[e], stats.squares[e], stats.gram[e])


def check(stats: Stats, x: np.ndarray) -> None:
    assert stats.count == len(x)
    for found, expected in (
        (stats.largest, abs(x).max(0)),
        (stats.total, abs(x).sum(0)),
        (stats.mean, abs(x).mean(0)),
        (stats.squares, (x**2).sum(0)),
        (stats.gram, x.T @ x),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_batches_add_up(mixture, hidden):
    apart = statistics(mixture, hidden, gram=True)
    each = [statistics(mixture, [x], gram=True) for x in hidden]
    both = {name: each[0][name] + each[1][name] for name in each[0]}
    assert set(apart) == set(both)
    assert (both["attention.out"].largest >= each[0]["attention.out"].largest).all()
    for name, stats in apart.items():
        for field in ("count", "largest", "total", "squares", "gram"):
            np.testing.assert_allclose(getattr(stats, field), getattr(both[name], field), rtol=1e-4, atol=1e-4)
    of_all = apart["ffn.experts.up"].together()
    assert of_all.count == 2 * 24
    np.testing.assert_allclose(of_all.squares, 2 * apart["ffn.shared.up"].squares, rtol=1e-4)


def test_inputs_that_are_not_finite_are_named(mixture, hidden):
    bad = [hidden[0], hidden[1] * np.inf]
    with pytest.raises(InputError, match=r"the inputs of layers\.4\.attention\.query are NaN or infinite"):
        statistics(mixture, bad, gram=True, at="layers.4.")


def test_routing_can_be_given(mixture, hidden):
    x = jnp.asarray(hidden[0])
    out, routing = run(mixture, x)
    assert routing is not None
    assert routing.shape == (2, 6, 3)
    same, given = run(mixture, x, routing)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(given, routing)
    assert not np.allclose(run(mixture, x, -routing)[0], out)
