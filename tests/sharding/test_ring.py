"""The ring: keys and values that travel past resting queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh, over
from split_attention import EVERYTHING, TOKENS, compare

from pallas_kernels import flash_attention
from pallas_kernels.errors import InputError
from sharding import zigzag
from sharding.ring import head_groups, ring_attention, ring_steps


@pytest.mark.parametrize("chips", [2, 4, 8])
def test_ring(chips: int) -> None:
    compare(ring_attention, 64, chips)
    compare(ring_attention, 37, chips, **EVERYTHING)
    compare(ring_attention, 64, chips, lengths=np.array([50, 3], np.int32), **EVERYTHING)


# At 64 tokens on 8 chips a chunk is 4 tokens, and 2 * 3 chunks back are still less than all round the ring.
@pytest.mark.parametrize("window", [1, 3, 5, 6, 12, 13, 14, 40, 100])
def test_ring_with_windows(window: int) -> None:
    compare(ring_attention, 64, 8, window=window, lengths=np.array([64, 29], np.int32), **EVERYTHING)


@pytest.mark.parametrize("chips", [2, 4])
def test_ring_with_windows_on_fewer_chips(chips: int) -> None:
    compare(ring_attention, 63, chips, window=9)


def test_windows_skip_steps() -> None:
    assert ring_steps(8, 1024, None) == (7, 0)
    assert ring_steps(8, 1024, 1) == (0, 0)
    assert ring_steps(8, 1024, 1025) == (1, 1)
    assert ring_steps(8, 1024, 1026) == (2, 2)
    assert ring_steps(8, 1024, 3 * 1024 + 2) == (7, 0)
    assert ring_steps(64, 1024, 4096) == (4, 4)


def sent(chips, tokens, **mask) -> int:
    """Bytes that each chip sends in a pass of the program as lowered: loops are multiplied out by their length."""
    where = mesh(sequence=chips)
    shape = jax.ShapeDtypeStruct((1, 2, tokens, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(over(where, lambda q, k, v: ring_attention(q, k, v, **mask), (TOKENS,) * 3, TOKENS))(
        shape, shape, shape
    )

    def count(jaxpr, times=1):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "ppermute":
                total += times * sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)
            inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            for value in eqn.params.values():
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    total += count(value, inner)
        return total

    return count(jaxpr.jaxpr)


def test_bytes_sent() -> None:
    """A chip's K and V go to s - 1 others; under a short window only one chunk of them each way."""
    own = 2 * 2 * 16 * 8 * 4  # k and v, heads, tokens, channels, float32
    assert sent(8, 8 * 16) == 7 * own
    assert sent(2, 2 * 16) == own
    assert sent(8, 8 * 16, window=9) == own // 2 + own // 2
    assert sent(8, 8 * 16, window=10) == 2 * (own // 2 + own)
    assert sent(8, 8 * 16, window=1) == 0


def test_gradients() -> None:
    """Those of one chip, through the ring's transfers, for rows of which some end early."""
    draw = np.random.default_rng(1).normal
    q, k, v, weight = (draw(size=(2, h, 16, 8)).astype(np.float32) for h in (4, 2, 2, 4))
    lengths = np.array([16, 7], np.int32)
    weight = np.where(np.arange(16)[None, None, :, None] < lengths[:, None, None, None], weight, 0)

    def plain(q, k, v):
        return jnp.sum(flash_attention(q, k, v, lengths=lengths, implementation="reference") * weight)

    run = over(
        mesh(sequence=4),
        lambda q, k, v, n: ring_attention(q, k, v, lengths=n),
        (TOKENS, TOKENS, TOKENS, P()),
        TOKENS,
    )

    def ring(q, k, v):
        out = run(*(zigzag.to_zigzag(x, 4, 2) for x in (q, k, v)), lengths)
        return jnp.sum(zigzag.from_zigzag(out, 4, 2) * weight)

    for got, want in zip(jax.grad(ring, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_heads_one_group_after_another(monkeypatch) -> None:
    """Where the sums of all heads would take too much memory."""
    assert head_groups(4 * 2 * 1024 * 128, 8) == 1
    assert head_groups(32 * 16384 * 128, 8) == 4
    assert head_groups(32 * 131072 * 128, 8) == 8  # there are no more to part
    assert head_groups(32 * 16384 * 128, 1) == 1
    monkeypatch.setattr("sharding.ring.SHARE", 1e12)
    compare(ring_attention, 64, 4, lengths=np.array([50, 3], np.int32), **EVERYTHING)
    compare(ring_attention, 37, 2, heads=6, kv_heads=3, window=9)


def test_odd_tokens_are_refused() -> None:
    x = jnp.zeros((1, 1, 6, 8))
    with pytest.raises(InputError, match=r"q has 3 and k has 3 tokens a chip.*multiple of 4"):
        over(mesh(sequence=2), ring_attention, (TOKENS,) * 3, TOKENS)(x, x, x)
