"""Caches in fewer bits against attention over keys and values that are rounded by the plain definitions."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinf.cache import (
    KINDS,
    AttentionRule,
    DenseCache,
    Grouped,
    RollingCache,
    Scaled,
    Step,
    blocks,
    layer_cache,
    nibbles,
    row_bytes,
    slot_bytes,
)
from jaxinf.cache.grouped import GROUP
from jaxinf.cli.options import CACHES
from jaxinf.layers import RopeSpec
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.stored import to_bits

BATCH, HEADS, KV_HEADS, LONG = 2, 4, 2, 16


# The definitions, in numpy and token by token. Arrays are [heads, tokens, channels].


def eight_bits(x: np.ndarray, kind: str) -> np.ndarray:
    top = np.float32(127 if kind == "int8" else 448)
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest * (1 / top), np.float32(1))
    codes = np.clip(x / scale, -top, top)
    codes = np.rint(codes) if kind == "int8" else codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return codes * scale


def down(x: np.ndarray) -> np.ndarray:
    """The next bfloat16 at or below."""
    near = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    below = np.nextafter(near.astype(ml_dtypes.bfloat16), np.array(-np.inf, ml_dtypes.bfloat16))
    return np.where(near > x, below.astype(np.float32), near)


def four_bits(x: np.ndarray, axis: int) -> np.ndarray:
    zero = down(x.min(axis, keepdims=True))
    step = -down(-np.maximum((x.max(axis, keepdims=True) - zero) * np.float32(1 / 15), np.float32(2.0**-100)))
    return zero + step * np.clip(np.rint((x - zero) / step), 0, 15)


def keys_seen(k: np.ndarray, kind: str, ended: int, angles) -> np.ndarray:
    """All keys of a row, rotated, as a query sees them for whom `ended` tokens are in groups that are over."""
    at = jnp.arange(k.shape[1])[None]

    def turned(x):
        return np.asarray(angles(jnp.asarray(x[None]), at)[0])

    if kind != "int4":
        return eight_bits(turned(k), kind)
    groups = [four_bits(k[:, i : i + GROUP], 1) for i in range(0, ended, GROUP)]
    return turned(np.concatenate([*groups, k[:, ended:]], axis=1))


def values_seen(v: np.ndarray, kind: str) -> np.ndarray:
    return four_bits(v, -1) if kind == "int4" else eight_bits(v, kind)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, t: int, window: int | None) -> np.ndarray:
    """A query of all heads at position t: [heads, channels]."""
    first = 0 if window is None else max(0, t + 1 - window)
    k, v = (np.repeat(x[:, first : t + 1], HEADS // KV_HEADS, axis=0) for x in (k, v))
    scores = np.einsum("nd,nsd->ns", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ns,nsd->nd", weights / weights.sum(-1, keepdims=True), v)


def rope(dim: int):
    spec = RopeSpec(dim)
    return lambda x, at: spec.rotate(x, at, jnp.zeros((x.shape[0],), jnp.int32))


@functools.cache
def stepper(dim: int, layer: int | None):
    rule = AttentionRule(rotate=rope(dim))

    @partial(jax.jit, static_argnames="fresh")
    def step(cache, q, k, v, starts, counts, fresh):
        at = starts[:, None] + jnp.arange(q.shape[2])
        return cache.step(q, k, v, Step(at, counts, fresh), rule, layer=layer)

    return step


def poisoned(cache):
    """Nothing that was not written may be read."""

    def poison(x, axis):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.full_like(x, jnp.nan)
        return jnp.full_like(x, 0x7F)  # of a float8_e4m3fn, nan

    return cache.map_rows(poison)


# Queries past a row's count see slots that nobody wrote, and a nan there is one in the real ones' sums: so ragged
# passes of a few tokens come after some were taken back.
def check(cache, kind: str, dim: int, passes, *, back=None, window=None, layer=None, atol=2e-5) -> None:
    """Passes through a cache against the definitions. passes: (columns, counts). back: lengths before a pass."""
    draw = np.random.default_rng(0).normal
    history = [[np.zeros((KV_HEADS, 0, dim), np.float32)] * 2 for _ in range(BATCH)]
    # A channel that is large in all keys, as real ones have.
    offset = np.where(np.arange(dim) == 3, 6.0, 0.0)
    angles, cache = rope(dim), poisoned(cache)
    for n, (width, counts) in enumerate(passes):
        if back and n in back:
            history = [[x[:, :keep] for x in row] for row, keep in zip(history, back[n], strict=True)]
        starts = np.asarray([row[0].shape[1] for row in history], np.int32)
        q, k, v = (draw(size=(BATCH, h, width, dim)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
        k = k + offset.astype(np.float32)
        real = (np.arange(width) < np.asarray(counts)[:, None])[:, None, :, None]
        given = [np.where(real, x, np.nan) for x in (k, v)]
        out, cache = stepper(dim, layer)(cache, q, *given, starts, np.asarray(counts, np.int32), fresh=n == 0)
        for b, count in enumerate(counts):
            old_k, old_v = history[b]
            keys = np.concatenate([old_k, k[b, :, :count]], axis=1)
            values = np.concatenate([old_v, v[b, :, :count]], axis=1)
            history[b] = [keys, values]
            total = keys.shape[1]
            at = np.arange(starts[b], total)
            ends = (total - 1 if width > LONG else at) // GROUP * GROUP
            turned = np.asarray(angles(jnp.asarray(q[b : b + 1, :, :count]), jnp.asarray(at)[None])[0])
            seen = {int(end): keys_seen(keys, kind, int(end), angles) for end in np.unique(ends)}
            rounded = values_seen(values, kind)
            for i, t in enumerate(at):
                end = int(np.broadcast_to(ends, at.shape)[i])
                want = attention(turned[:, i], seen[end], rounded, int(t), window)
                np.testing.assert_allclose(out[b, :, i], want, atol=atol)


PASSES = [(150, [150, 67]), (1, [1, 1]), (5, [5, 3]), (70, [0, 61]), (1, [1, 1])]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=SLOW), "int4"])
def test_what_is_stored_is_what_is_read(kind: str, monkeypatch) -> None:
    """In a stack of layers, in blocks with a rest; within passes, over boundaries of groups, after taking back."""
    monkeypatch.setattr(blocks, "BLOCK", 64)
    cache = DenseCache.zeros(3, BATCH, KV_HEADS, 224, 16, jnp.float32, kind=kind)
    check(cache, kind, 16, PASSES, back={2: [129, 62], 4: [120, 100]}, layer=1)


@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=SLOW) for k in ("int8", "fp8")), "int4"])
def test_in_a_window_too(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)
    cache = RollingCache.zeros(None, BATCH, KV_HEADS, 37, 16, jnp.float32, max_append=6, kind=kind)
    assert cache.append_limit >= 5
    passes = [(150, [150, 67]), (1, [1, 1]), (5, [5, 3]), (5, [4, 5]), (1, [1, 1])]
    check(cache, kind, 16, passes, back={2: [149, 63]}, window=37)


# 77 and 65 tokens: odd, and just past a group. What rounding does to attention is bounded in `bound`.
DIMS = [(64, "int8"), (80, "fp8"), (96, "int4")]
OTHERS = [(dim, kind) for dim in (64, 80, 96, 128, 256) for kind in KINDS if (dim, kind) not in DIMS]


def bound(q, keys, rounded_keys, values, rounded_values) -> np.ndarray:
    """How far attention over rounded keys and values may be from that over the originals, for queries [n, D].

    A score moves by at most d = max_s |q (k_s - k'_s)| / sqrt(D), so each weight by a factor within e^(-2 d) and
    e^(2 d), and the result by at most (e^(2 d) - 1) max |v| + max |v - v'|.
    """
    moved = np.abs(np.einsum("nd,sd->ns", q, keys - rounded_keys)).max(1) * q.shape[-1] ** -0.5
    return np.expm1(2 * moved) * np.abs(values).max() + np.abs(values - rounded_values).max()


@pytest.mark.parametrize(("dim", "kind"), [*DIMS, *(pytest.param(*x, marks=SLOW) for x in OTHERS)])
def test_near_the_cache_of_floats(dim: int, kind: str) -> None:
    """By no more than the scheme's largest rounding: half a step of int8 and int4, a sixteenth of a float8."""
    random = np.random.default_rng(dim)
    counts, starts = np.asarray([77, 65], np.int32), np.zeros(BATCH, np.int32)
    q, k, v = (random.normal(size=(BATCH, h, 80, dim)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
    outs = {}
    for name in (None, kind):
        cache = poisoned(DenseCache.zeros(None, BATCH, KV_HEADS, 101, dim, jnp.float32, kind=name))
        real = (np.arange(77) < counts[:, None])[:, None, :, None]
        given = [np.where(real, x[:, :, :77], np.nan) for x in (k, v)]
        first, cache = stepper(dim, None)(cache, q[:, :, :77], *given, starts, counts, fresh=True)
        last, _ = stepper(dim, None)(
            cache, *(x[:, :, 79:] for x in (q, k, v)), counts, np.ones(BATCH, np.int32), False
        )
        outs[name] = np.asarray(first), np.asarray(last)
    angles = rope(dim)
    far = []
    for b, count in enumerate(counts):
        keys, values = (np.concatenate([x[b, :, :count], x[b, :, 79:]], axis=1) for x in (k, v))
        at = jnp.arange(count + 1)[None]
        turned = np.asarray(angles(jnp.asarray(keys[None]), at)[0])
        seen = keys_seen(keys, kind, int(count) // GROUP * GROUP, angles)
        if kind == "int4":
            assert np.abs(four_bits(keys[:, :GROUP], 1) - keys[:, :GROUP]).max() <= 1.02 * np.ptp(keys) / 30
        elif kind == "int8":
            assert (np.abs(seen - turned) <= np.abs(turned).max(-1, keepdims=True) / 254 * 1.001).all()
        queries = np.concatenate([q[b, :, :count], q[b, :, 79:]], axis=1)
        queries = np.asarray(angles(jnp.asarray(queries[None]), at)[0])
        for n in range(HEADS):
            head = n // (HEADS // KV_HEADS)
            most = bound(queries[n], turned[head], seen[head], values[head], values_seen(values, kind)[head])
            parts = [np.concatenate([outs[x][0][b, n, :count], outs[x][1][b, n]]) for x in (None, kind)]
            moved = np.abs(parts[0] - parts[1]).max(-1)
            assert (moved <= most + 1e-5).all()
            far.append(moved)
    assert max(x.max() for x in far) > 1e-5  # it does round


@settings(max_examples=8)
@given(st.integers(0, 99), st.sampled_from([6, 64]), st.sampled_from([-1, 0, 3]))
def test_nibbles(seed: int, width: int, magnitude: int) -> None:
    """Half a step at most, the step a fifteenth of the range up to rounding; equal numbers and zeros come back."""
    x = (np.random.default_rng(seed).normal(size=(5, width)) * 10.0**magnitude + 10.0 * (seed % 3)).astype(
        np.float32
    )
    x[0], x[1] = 0.0, 4.0
    codes, ranges = nibbles.encode(jnp.asarray(x), 1)
    assert (np.asarray(nibbles.unpack(nibbles.pack(codes))) == codes).all()
    back = np.asarray(nibbles.decode(codes, ranges[:, None]))
    np.testing.assert_allclose(back, four_bits(x, 1), rtol=1e-6)
    np.testing.assert_array_equal(back[:2], x[:2])
    step, _ = nibbles.parts(ranges)
    assert np.isfinite(ranges).all()
    assert (np.asarray(ranges) >= 2.0**-126).all()
    assert (np.abs(back - x) <= np.asarray(step)[:, None] * 0.501).all()
    largest = np.abs(x).max(1)
    assert (np.asarray(step) <= (np.ptp(x, axis=1) / 15 + largest / 15 * 2.0**-7) * (1 + 2.0**-7) + 2.0**-99).all()


@pytest.mark.parametrize(("dim", "most"), [(64, 0.532), (128, 0.516), (256, 0.508)])
def test_bytes_of_a_token(dim: int, most: float) -> None:
    """Of what bfloat16 takes, scales included: (D + 4) / 2 D in eight bits."""

    def stored(kind: str | None, slots: int) -> int:
        make = partial(DenseCache.zeros, 2, 3, 2, slots, dim, jnp.bfloat16, kind=kind)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))

    for kind in (None, *KINDS):
        rows, slots = 2 * 3 * 2, 4 * GROUP
        assert stored(kind, 2 * slots) - stored(kind, slots) == rows * slots * 2 * slot_bytes(kind, dim, "bfloat16")
        fixed = 2 * stored(kind, slots) - stored(kind, 2 * slots)
        assert fixed == rows * row_bytes(kind, dim, "bfloat16")
    assert slot_bytes("int8", dim, "bfloat16") / slot_bytes(None, dim, "bfloat16") <= most
    assert slot_bytes("int4", dim, "bfloat16") / slot_bytes(None, dim, "bfloat16") <= 0.2813


def test_stores_of_a_kind() -> None:
    options = dict(heads=4, kv_heads=2, head_dim=8, capacity=100, dtype="float32")
    found = {kind: layer_cache(None, 3, kind=kind, **options) for kind in KINDS}
    assert [type(c.store) for c in found.values()] == [Scaled, Scaled, Grouped]
    assert found["int8"].store.k.dtype == jnp.int8
    assert found["fp8"].store.format == "float8_e4m3fn"
    assert found["fp8"].store.k.dtype == to_bits(jnp.zeros((), jnp.float8_e4m3fn)).dtype  # on a CPU
    assert [c.capacity for c in found.values()] == [100, 100, 128]
    assert [c.append_limit for c in found.values()] == [None, None, GROUP]


def test_rows_are_taken_with_all_they_have() -> None:
    for kind in ("int8", "int4"):
        cache = RollingCache.zeros(2, 4, 1, 9, 8, jnp.float32, max_append=1, kind=kind)
        marked = cache.map_rows(
            lambda x, axis: jnp.broadcast_to(jnp.arange(4).reshape(-1, *[1] * (x.ndim - axis - 1)), x.shape).astype(
                x.dtype
            )
        )
        for x in jax.tree.leaves(marked.take(jnp.asarray([3, 1, 3]))):
            assert np.unique(np.asarray(x[:, 0], np.float32)).tolist() == [3]
            assert np.unique(np.asarray(x[:, 1], np.float32)).tolist() == [1]
            assert x.shape[1] == 3


def test_bad_kinds() -> None:
    options = dict(heads=4, kv_heads=2, head_dim=8, capacity=100, dtype="float32")
    with pytest.raises(InputError, match="kind='int5' must be 'int8', 'fp8', 'int4', or None"):
        layer_cache(None, 1, kind="int5", **options)
    with pytest.raises(UnsupportedError, match="head_dim=7 is odd"):
        layer_cache(None, 1, kind="int4", **options | dict(head_dim=7))
    assert CACHES == KINDS
