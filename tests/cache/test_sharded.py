"""Caches that several chips hold, against one chip's."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh, over

from jaxinf.cache import (
    AttentionRule,
    BatchSharded,
    DenseCache,
    Floats,
    RollingCache,
    SequenceSharded,
    SinkCache,
    Step,
    grouped,
    kinds,
    kv_placement,
    layer_cache,
)
from jaxinf.layers import RopeSpec
from pallas_kernels.errors import UnsupportedError
from sharding import zigzag
from sharding.collectives import AXES, part

BATCH, HEADS, KV_HEADS, DIM, CAPACITY, WINDOW = 4, 8, 2, 8, 64, 6
OWN = P(AXES)  # a chip's own state: one entry of a new first axis
# Real tokens of each row in each pass; before the third one tokens are taken back.
PASSES = [(24, [21, 5, 24, 1]), (1, [1, 1, 1, 1]), (5, [5, 2, 0, 5]), (20, [20, 0, 3, 7]), (1, [0, 1, 1, 1])]
BACK = {2: [18, 6, 23, 1], 4: [37, 7, 25, 12]}


def rope(x, at):
    return RopeSpec(DIM).rotate(x, at, jnp.zeros((x.shape[0],), jnp.int32))


BIASED = AttentionRule(
    alibi_slopes=jnp.linspace(0.5, 0.05, HEADS), softcap=3.0, sinks=jnp.linspace(-1.0, 1.0, HEADS), scale=0.5
)
RULES = dict(
    plain=AttentionRule(rotate=rope),
    biased=BIASED,
    without_sinks=dataclasses.replace(BIASED, sinks=None),
    window=dataclasses.replace(BIASED, window=WINDOW),
)


def of_heads(rule: AttentionRule) -> AttentionRule:
    """The rule of the heads that a chip of `tensor` has."""
    given = {name: getattr(rule, name) for name in ("sinks", "alibi_slopes")}
    own = {name: None if x is None else part(x, "tensor", 0) for name, x in given.items()}
    return dataclasses.replace(rule, **own)


def walk(sizes, make, rule, layer=None, dtype=np.float32, back=None):
    """All passes through the cache that `make` gives on each chip: out `[B, N, T, D]`, real columns `[B, T]`."""
    where, draw = mesh(**sizes), np.random.default_rng(0).normal
    copies = max(1, sizes.get("tensor", 1) // KV_HEADS)
    chips = sizes.get("sequence", 1)

    def each(state):
        return jax.tree.map(lambda x: x[None], state)

    def step(cache, q, k, v, starts, counts, fresh):
        width = q.shape[2] * (chips if fresh else 1)
        split = fresh and chips > 1
        at = starts[:, None] + jnp.arange(width, dtype=jnp.int32)
        given = Step(zigzag.share(at) if split else at, counts, fresh, split)
        cache = jax.tree.map(lambda x: x[0], cache)
        out, cache = cache.step(q, k, v, given, of_heads(RULES[rule]), layer=layer)
        return zigzag.whole(out, 2) if split else out, each(cache)

    cache = over(where, lambda: each(make()), (), OWN)()
    held = np.zeros(BATCH, np.int32)
    for n, (width, counts) in enumerate(PASSES):
        held = np.asarray((BACK if back is None else back).get(n, held), np.int32)
        counts, fresh = np.asarray(counts, np.int32), n == 0
        real = np.arange(width)[None] < counts[:, None]
        q, k, v = (draw(size=(BATCH, h, width, DIM)) for h in (HEADS, KV_HEADS, KV_HEADS))
        if fresh:  # padding is never read
            q, k, v = (np.where(real[:, None, :, None], x, np.nan) for x in (q, k, v))
        given = [x.astype(dtype) for x in (q, np.repeat(k, copies, axis=1), np.repeat(v, copies, axis=1))]
        if fresh and chips > 1:
            given = [zigzag.to_zigzag(jnp.asarray(x), chips, 2) for x in given]
        tokens = P(None, "tensor", "sequence" if fresh else None)
        specs = (OWN, tokens, tokens, tokens, P(), P())
        out, cache = over(where, partial(step, fresh=fresh), specs, (P(None, "tensor"), OWN))(
            cache, *given, held, counts
        )
        yield np.asarray(out[:, :, :width], np.float32), real
        held = held + counts


_on_one_chip = {}


@functools.cache
def plain_of(make, kind):
    """One function for each kind: answers on one chip are kept by it."""
    return partial(make, kind=kind)


def same(sizes, make, plain, rule, atol=1e-5, **options):
    key = plain, rule, str(options)
    if key not in _on_one_chip:
        _on_one_chip[key] = list(walk({}, plain, rule, **options))
    for (out, real), (want, _) in zip(walk(sizes, make, rule, **options), _on_one_chip[key], strict=True):
        out, want = (np.where(real[:, None, :, None], x, 0) for x in (out, want))
        np.testing.assert_allclose(out, want, atol=atol)


def dense(layers=None, dtype=jnp.float32, **kind):
    return DenseCache.zeros(layers, BATCH, KV_HEADS, CAPACITY, DIM, dtype, **kind)


def striped(chips, kv_heads=KV_HEADS, layers=None, batch=BATCH, dtype=jnp.float32, **more):
    return SequenceSharded.zeros(layers, batch, kv_heads, CAPACITY // chips, DIM, dtype, **more)


@pytest.mark.parametrize(("chips", "rule"), [(2, "biased"), (4, "plain"), (8, "biased")])
def test_tokens_over_sequence(chips: int, rule: str) -> None:
    same(dict(sequence=chips), lambda: striped(chips), dense, rule)


def test_a_stack_of_layers() -> None:
    same(dict(sequence=4), lambda: striped(4, layers=3), lambda: dense(3), "plain", layer=1)


def test_bfloat16_as_its_bits() -> None:
    bits = jnp.uint16
    make, plain = lambda: striped(4, dtype=bits), lambda: dense(dtype=bits)
    same(dict(sequence=4), make, plain, "biased", dtype=jnp.bfloat16, atol=3e-2)


SHARED = [(dict(tensor=4), "plain"), (dict(tensor=8), "biased"), (dict(tensor=4, sequence=2), "biased")]


@pytest.mark.parametrize(("sizes", "rule"), SHARED, ids=str)
def test_tokens_over_chips_that_share_a_head(sizes: dict, rule: str) -> None:
    group = sizes["tensor"] // KV_HEADS
    chips = group * sizes.get("sequence", 1)
    same(sizes, lambda: striped(chips, kv_heads=1, group=group), dense, rule)


@pytest.mark.parametrize(("sizes", "rule"), SHARED, ids=str)
def test_rows_over_chips_that_share_a_head(sizes: dict, rule: str) -> None:
    group, chips = sizes["tensor"] // KV_HEADS, sizes.get("sequence", 1)

    def make():
        own = BATCH // group
        one = DenseCache.zeros(None, own, 1, CAPACITY, DIM, jnp.float32)
        return BatchSharded(one if chips == 1 else striped(chips, kv_heads=1, batch=own), group)

    same(sizes, make, dense, rule)


def rolling(batch=BATCH, kv_heads=KV_HEADS, **kind):
    return RollingCache.zeros(None, batch, kv_heads, WINDOW, DIM, jnp.float32, max_append=5, **kind)


@pytest.mark.parametrize("sizes", [dict(sequence=2), dict(sequence=8), dict(sequence=2, tensor=4)], ids=str)
def test_windows_whole_on_every_chip(sizes: dict) -> None:
    group = max(1, sizes.get("tensor", 1) // KV_HEADS)

    def make():
        return rolling() if group == 1 else BatchSharded(rolling(BATCH // group, 1), group)

    back = {2: [21, 6, 24, 2], 4: [40, 7, 26, 13]}
    same(sizes, make, rolling, "window", back=back)


def with_sinks(**kind):
    return SinkCache.zeros(None, BATCH, KV_HEADS, WINDOW, DIM, jnp.float32, sinks=3, max_append=5, **kind)


@pytest.mark.parametrize(("chips", "rule"), [(2, "plain"), (8, "without_sinks")])
def test_attention_sinks_on_every_chip(chips: int, rule: str) -> None:
    same(dict(sequence=chips), with_sinks, with_sinks, rule, back={})


@pytest.fixture
def small_groups(monkeypatch):
    """Rows of int4 keys reach over several groups."""
    for where in (grouped, kinds):
        monkeypatch.setattr(where, "GROUP", 8)
        monkeypatch.setattr(where, "RECENT", 32)


SLOW = pytest.mark.slow
EIGHT_BITS = [(dict(sequence=4), "int8"), pytest.param(dict(tensor=4, sequence=2), "fp8", marks=SLOW)]


@pytest.mark.parametrize(("sizes", "kind"), EIGHT_BITS, ids=str)
def test_eight_bits_over_chips(sizes: dict, kind: str) -> None:
    """Tokens are rounded one by one, wherever they lie."""
    group = max(1, sizes.get("tensor", 1) // KV_HEADS)
    chips = group * sizes["sequence"]
    make = partial(striped, chips, kv_heads=KV_HEADS // group, group=group, kind=kind)
    same(sizes, make, plain_of(dense, kind), "plain")


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=SLOW), "int4"])
def test_narrow_rows_over_chips_that_share_a_head(kind: str, small_groups) -> None:
    def make():
        one = DenseCache.zeros(None, BATCH // 2, 1, CAPACITY, DIM, jnp.float32, kind=kind)
        return BatchSharded(one, 2)

    same(dict(tensor=4), make, plain_of(dense, kind), "plain", back={2: [18, 6, 23, 1]})


@pytest.mark.parametrize(
    ("kind", "sizes"), [("int8", dict(sequence=2, tensor=4)), ("int4", dict(sequence=2))], ids=str
)
@pytest.mark.slow
def test_narrow_windows_whole_on_every_chip(kind: str, sizes: dict, small_groups) -> None:
    group = max(1, sizes.get("tensor", 1) // KV_HEADS)

    def make():
        if group == 1:
            return rolling(kind=kind)
        return BatchSharded(rolling(BATCH // group, 1, kind=kind), group)

    same(sizes, make, plain_of(rolling, kind), "window", back={2: [21, 6, 24, 2]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_narrow_attention_sinks_on_every_chip(kind: str, small_groups) -> None:
    make = plain_of(with_sinks, kind)
    same(dict(sequence=2), make, make, "plain", back={})


@pytest.mark.slow
def test_int4_over_chips_is_near(small_groups) -> None:
    """Groups are of each chip's own tokens, so not those of one chip; scores of normal numbers move by little."""
    floats = list(walk({}, dense, "plain", back={}))
    for (out, real), (want, _) in zip(
        walk(dict(sequence=2), partial(striped, 2, kind="int4"), "plain", back={}), floats, strict=True
    ):
        far = np.abs(np.where(real[:, None, :, None], out - want, 0))
        assert 1e-4 < far.max() < 1.0
        assert far[far > 0].mean() < 0.15


def test_rows_taken_from_other_chips() -> None:
    """Each chip of a group of four has two rows of eight; afterwards the rows that were asked for."""
    rows = jnp.asarray([7, 0, 0, 3, 5, 5, 6, 1])
    whole = np.arange(8 * 3 * DIM, dtype=np.float32).reshape(8, 1, 3, DIM)

    def taken(x):
        cache = BatchSharded(DenseCache(Floats(part(x, "tensor", 0), part(-x, "tensor", 0))), 4)
        return cache.take(rows).rows.store.k, cache.take(rows).rows.store.v

    k, v = over(mesh(tensor=4), taken, (P(),), P("tensor"))(whole)
    np.testing.assert_array_equal(k, whole[np.asarray(rows)])
    np.testing.assert_array_equal(v, -whole[np.asarray(rows)])

    with pytest.raises(UnsupportedError, match="3 rows"):
        over(
            mesh(tensor=4),
            lambda x: BatchSharded(DenseCache(Floats(x, x)), 4).take(rows[:3]).rows.store.k,
            (P(),),
            P(),
        )(whole)


def test_what_does_not_fit_together_is_refused() -> None:
    x = np.zeros((1, 1, 2, DIM), np.float32)
    step = Step(jnp.zeros((1, 2), jnp.int32), fresh=True)

    def run(sizes, cache, rule=RULES["plain"], step=step):
        return over(mesh(**sizes), lambda x: cache.step(x, x, x, step, rule)[0], (P(),), P())(x)

    two = over(mesh(sequence=2), lambda: striped(2, 1, batch=1), (), P(None, None, "sequence"))()
    with pytest.raises(UnsupportedError, match="made for sequence=2, but the mesh has sequence=4"):
        run(dict(sequence=4), two)
    with pytest.raises(UnsupportedError, match="RollingCache"):
        run(dict(sequence=2), two, AttentionRule(window=3))
    with pytest.raises(UnsupportedError, match="DenseCache holds whole rows"):
        run(dict(sequence=2), DenseCache(Floats(x, x)), step=dataclasses.replace(step, zigzag=True))


def test_placement_is_picked_by_bytes() -> None:
    llama = dict(heads=64, kv_heads=8, head_dim=128)
    assert kv_placement(**llama, tensor=8, batch=16, capacity=4096) == "replicate"
    assert kv_placement(**llama, tensor=16, batch=16, capacity=4096) == "batch"
    assert kv_placement(**llama, tensor=16, batch=1, capacity=4096) == "sequence"
    assert kv_placement(**llama, tensor=16, batch=1, capacity=4096, striped=False) == "replicate"
    assert kv_placement(**llama, tensor=16, batch=1, capacity=16) == "replicate"

    # By the formula: 2 B S D i = 2 * 3 * S * 8 * 2 against that halved and 16 * 1 * 3 * 2 * (8 * 2 + 4 * 8 + 8).
    sizes = dict(heads=8, kv_heads=2, head_dim=8, batch=3, tensor=4)
    turn = next(n for n in range(2, 1000, 2) if kv_placement(**sizes, capacity=n) == "sequence")
    costs = [(96 * n, 48 * n + 16 * 3 * 2 * (8 * 2 + 4 * 8 + 8)) for n in (turn - 2, turn)]
    assert costs[0][0] <= costs[0][1]
    assert costs[1][0] > costs[1][1]


def test_a_layer_gets_the_cache_of_its_mesh() -> None:
    def made(sizes, **options):
        given = dict(heads=8, kv_heads=2, head_dim=8, capacity=4096, dtype="float32") | options
        found = []

        def make():
            found.append(layer_cache(None, given.pop("batch", 4), **given))
            return jnp.zeros(())

        jax.eval_shape(jax.shard_map(make, mesh=mesh(**sizes), in_specs=(), out_specs=P(), check_vma=False))
        return found[0]

    def shape(cache):
        return jax.tree.leaves(cache)[0].shape

    assert isinstance(made({}), DenseCache)
    assert isinstance(made(dict(tensor=2)), DenseCache)
    assert shape(made(dict(tensor=2))) == (4, 1, 4096, 8)

    cache = made(dict(sequence=4))
    assert isinstance(cache, SequenceSharded)
    assert (shape(cache), cache.capacity) == ((4, 2, 1024, 8), 4096)

    cache = made(dict(tensor=8))
    assert isinstance(cache, BatchSharded)
    assert (shape(cache), cache.capacity) == ((1, 1, 4096, 8), 4096)

    cache = made(dict(tensor=4, sequence=2), batch=3)
    assert isinstance(cache, SequenceSharded)
    assert (shape(cache), cache.group, cache.capacity) == ((3, 1, 1024, 8), 2, 4096)

    cache = made(dict(sequence=2), window=32, max_append=3)
    assert isinstance(cache, RollingCache)
    assert shape(cache) == (4, 2, 34, 8)
    # A window beyond the capacity hides nothing: all tokens, on every chip of `sequence`, and no more.
    assert shape(made(dict(sequence=2), window=9999)) == (4, 2, 4096, 8)
    assert isinstance(made({}, window=9999), DenseCache)
    assert isinstance(made(dict(tensor=4), window=320), BatchSharded)
    assert isinstance(made(dict(tensor=4), bound=32, sinks=2), SinkCache)
