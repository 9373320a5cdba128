"""What a query sees through a window with sinks, against attention over keys that are moved together."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.cache import AttentionRule, SinkCache, Step
from jaxinf.layers import RopeSpec

BATCH, HEADS, KV_HEADS, DIM, WINDOW, SINKS, LENGTH = 2, 4, 2, 8, 5, 3, 14


def rotated(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The plain rope, by complex numbers: x [B, N, S, D], at [S]."""
    half = DIM // 2
    turn = np.exp(1j * at[:, None] * 10_000.0 ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def reference(q, k, v, rope: bool, slopes) -> np.ndarray:
    """Each query with the sinks and its window, all at their positions within the cache."""
    out = np.zeros((BATCH, HEADS, LENGTH, DIM))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    for t in range(LENGTH):
        seen = sorted({*range(min(SINKS, t + 1)), *range(max(0, t + 1 - WINDOW), t + 1)})
        at = np.arange(len(seen))
        query, keys = q[:, :, t : t + 1], k[:, :, seen]
        if rope:
            query, keys = rotated(query, at[-1:]), rotated(keys, at)
        scores = np.einsum("bntd,bnsd->bns", query, keys) * DIM**-0.5
        if slopes is not None:
            scores = scores + np.asarray(slopes)[None, :, None] * (at - at[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, t] = np.einsum("bns,bnsd->bnd", weights / weights.sum(-1, keepdims=True), v[:, :, seen])
    return out


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_positions_are_those_within_the_cache(positions: str) -> None:
    draw = np.random.default_rng(0).normal
    q, k, v = (draw(size=(BATCH, n, LENGTH, DIM)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625]) if positions == "alibi" else None
    rope = RopeSpec(DIM)

    def rotate(x, at):
        return rope.rotate(x, at, jnp.full((BATCH,), LENGTH))

    rule = AttentionRule(rotate=None if slopes is not None else rotate, alibi_slopes=slopes)

    @partial(jax.jit, static_argnames="fresh")
    def step(cache, q, k, v, at, fresh):
        return cache.step(q, k, v, Step(at, fresh=fresh), rule)

    def passes(*ends: int) -> np.ndarray:
        cache = SinkCache.zeros(None, BATCH, KV_HEADS, WINDOW, DIM, jnp.float32, sinks=SINKS, max_append=1)
        outs, start = [], 0
        for end in ends:
            at = np.broadcast_to(np.arange(start, end), (BATCH, end - start))
            out, cache = step(cache, *(x[:, :, start:end] for x in (q, k, v)), at, fresh=start == 0)
            outs.append(out)
            start = end
        return np.concatenate(outs, axis=2)

    want = reference(q, k, v, slopes is None, slopes)
    np.testing.assert_allclose(passes(LENGTH), want, atol=2e-5)
    np.testing.assert_allclose(passes(6, *range(7, LENGTH + 1)), want, atol=2e-5)
    np.testing.assert_allclose(passes(6, 13, LENGTH), want, atol=2e-5)
