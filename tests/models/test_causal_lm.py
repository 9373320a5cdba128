"""The model through its caches gives what it gives without, in either layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.cache import RollingCache, SinkCache
from jaxinf.layers import (
    AlibiSpec,
    AttentionSpec,
    FFNSpec,
    LayerNormSpec,
    LayerSpec,
    MoESpec,
    Plain,
    QKNormSpec,
    RopeSpec,
    TokenChoice,
)
from jaxinf.models import CausalLM, ModelSpec, fold
from pallas_kernels.errors import InputError

BATCH, LENGTH, VOCAB = 3, 26, 40
BASE = AttentionSpec(4, 2, 8, rope=RopeSpec(8))


def mixed() -> ModelSpec:
    """A period of three (window, full, window with a mixture), twice, and a remainder."""
    window = dataclasses.replace(BASE, window=5, qk_norm=QKNormSpec(), softcap=20.0)
    full = dataclasses.replace(BASE, sinks=True, qkv_bias=True)
    layers = [
        LayerSpec(window, FFNSpec(24), placement="sandwich"),
        LayerSpec(full, FFNSpec(24), placement="post"),
        LayerSpec(window, MoESpec(4, 16, TokenChoice(top_k=2)), residual_scale=0.5),
    ]
    return ModelSpec(VOCAB, 16, fold(layers * 2 + layers[:1]), 64, tied=True, embed_scale=4.0, logit_softcap=5.0)


def alibi() -> ModelSpec:
    attention = AttentionSpec(4, 1, 8, alibi=AlibiSpec(), out_bias=True)
    layer = LayerSpec(attention, FFNSpec(24, Plain("gelu"), bias=True), LayerNormSpec(), placement="parallel")
    return ModelSpec(VOCAB, 16, fold([layer] * 2), 64, embed_norm=LayerNormSpec(), head_bias=True, logit_scale=0.5)


def learned() -> ModelSpec:
    layer = LayerSpec(AttentionSpec(2, 2, 8), FFNSpec(24), placement="parallel_two_norms")
    return ModelSpec(VOCAB, 16, fold([layer] * 2), 64, learned_positions=64)


SPECS = {"mixed": mixed, "alibi": alibi, "learned": learned}


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(3), (BATCH, LENGTH), 0, VOCAB, jnp.int32)


def all_of(n: int) -> jax.Array:
    return jnp.full((BATCH,), n, jnp.int32)


class Run:
    """A model, jitted once: whole passes, and passes through a cache."""

    def __init__(self, spec: ModelSpec, layout: str):
        self.model = CausalLM(spec, rngs=nnx.Rngs(0), layout=layout)
        graph, self.params = nnx.split(self.model)
        # Sinks, biases and norms start where they do nothing.
        self.params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), self.params)
        self.whole = jax.jit(lambda p, t: nnx.merge(graph, p)(t))

        def step(p, t, cache, counts, fresh):
            model = nnx.merge(graph, p)
            hidden, cache, _ = model.hidden(t, cache, counts=counts, fresh=fresh)
            return model.logits(hidden), cache

        self.step = jax.jit(step, static_argnames="fresh")


RUNS = [("mixed", "list"), ("mixed", "stacked"), ("alibi", "list"), ("learned", "stacked")]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request):
    name, layout = request.param
    return Run(SPECS[name](), layout)


def test_layouts_hold_the_same_weights():
    """The same seed draws the same weights: only the stacking differs."""
    listed, stacked = (CausalLM(mixed(), rngs=nnx.Rngs(0), layout=x) for x in ("list", "stacked"))
    assert len(listed.segments[0].blocks) == 6
    assert len(stacked.segments[0].blocks) == 3
    for slot, block in enumerate(stacked.segments[0].blocks):
        for repeat in range(2):
            want = listed.segments[0].blocks[3 * repeat + slot].attention.query.kernel[...]
            np.testing.assert_array_equal(block.attention.query.kernel[...][repeat], want)
    np.testing.assert_allclose(listed(tokens()), stacked(tokens()), atol=2e-5)


def test_ragged_passes_through_the_cache(run):
    """A fresh ragged prompt, a chunk, several tokens at once, single tokens: each row as if alone."""
    t, cache = tokens(), run.model.init_cache(BATCH, LENGTH, max_append=4)
    want = np.asarray(run.whole(run.params, t))
    at = np.zeros(BATCH, int)
    # (columns, real tokens of each row): prompt; a chunk longer than the window; appends; single tokens.
    passes = [(8, [8, 3, 5]), (9, [4, 9, 2]), (3, [3, 0, 1]), (3, [3, 3, 3]), (1, [1, 1, 1]), (1, [1, 1, 0])]
    for i, (width, counts) in enumerate(passes):
        columns = np.zeros((BATCH, width), np.int32)
        for b, n in enumerate(counts):
            columns[b, :n] = t[b, at[b] : at[b] + n]
        args = jnp.asarray(columns), cache, jnp.asarray(counts, jnp.int32)
        got, cache = run.step(run.params, *args, fresh=i == 0)
        for b, n in enumerate(counts):
            np.testing.assert_allclose(got[b, :n], want[b, at[b] : at[b] + n], atol=3e-5)
        at += counts
    np.testing.assert_array_equal(cache.lengths, at)


def test_taking_tokens_back(run):
    """Tokens appended and rolled back leave no trace, as many as `append_limit`."""
    t, cache = tokens(), run.model.init_cache(BATCH, LENGTH, max_append=4)
    want = np.asarray(run.whole(run.params, t))
    _, cache = run.step(run.params, t[:, :8], cache, all_of(8), fresh=True)
    assert cache.append_limit in (None, 3)
    wrong = ((t[:, 8:11] + 1) % VOCAB).at[:, 0].set(t[:, 8])
    _, drafted = run.step(run.params, wrong, cache, all_of(3), fresh=False)
    kept = drafted.roll_back(cache.lengths + 1)
    got, _ = run.step(run.params, t[:, 9:12], kept, all_of(3), fresh=False)
    np.testing.assert_allclose(got, want[:, 9:12], atol=3e-5)


def test_windows_bound_the_memory():
    model = CausalLM(mixed(), rngs=nnx.Rngs(0))
    cache = model.init_cache(2, 1000, max_append=4)
    kinds = [type(c) for c in cache.layers[0]]
    assert kinds.count(RollingCache) == 4
    rolling = next(c for c in cache.layers[0] if isinstance(c, RollingCache))
    assert rolling.store.k.shape == (2, 2, 5 + 4 - 1, 8)
    assert cache.capacity == 1000
    assert cache.append_limit == 3
    full = 2 * 2 * 1000 * 8 * 4 * 2
    assert cache.nbytes == 2 * full + 5 * 2 * 2 * 8 * 8 * 4 * 2


def test_sinks_are_exact_until_the_window_is_full_and_bounded_after():
    spec = ModelSpec(VOCAB, 16, fold([LayerSpec(BASE, FFNSpec(24))] * 2), 64)
    run, t = Run(spec, "list"), tokens()
    cache = run.model.init_cache(BATCH, LENGTH, window=12, sinks=3)
    assert all(isinstance(c, SinkCache) for c in cache.layers[0])
    assert cache.capacity is None
    size = cache.nbytes
    want = np.asarray(run.whole(run.params, t))
    got, cache = run.step(run.params, t[:, :9], cache, None, fresh=True)
    np.testing.assert_allclose(got, want[:, :9], atol=3e-5)
    for i in range(9, 24):
        got, cache = run.step(run.params, t[:, i : i + 1], cache, None, fresh=False)
        # The window holds 12 tokens and the sinks the 3 before them: the 16th token is the first to miss one.
        close = np.allclose(got[:, 0], want[:, i], atol=3e-5)
        assert close == (i < 12 + 3)
    assert cache.nbytes == size


def test_sinks_in_one_pass_equal_sinks_token_by_token():
    spec = ModelSpec(VOCAB, 16, fold([LayerSpec(dataclasses.replace(BASE, sinks=True), FFNSpec(24))] * 2), 64)
    for layout in ("list", "stacked"):
        run, t = Run(spec, layout), tokens()
        one = run.model.init_cache(BATCH, LENGTH, window=6, sinks=2, max_append=3)
        whole, _ = run.step(run.params, t[:, :20], one, None, fresh=True)
        steps, cache = [], one
        for lo, hi in ((0, 1), (1, 4), (4, 5), (5, 7), (7, 18), (18, 20)):
            got, cache = run.step(run.params, t[:, lo:hi], cache, None, fresh=False)
            steps.append(got)
        np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=3e-5)


def test_packed_segments_do_not_see_each_other():
    run, t = Run(mixed(), "list"), tokens()
    segments = jnp.asarray([[0] * 10 + [1] * 16] * BATCH, jnp.int32)
    positions = jnp.asarray([list(range(10)) + list(range(16))] * BATCH, jnp.int32)
    hidden, _, _ = run.model.hidden(t, segment_ids=segments, positions=positions)
    alone, _, _ = run.model.hidden(t[:, 10:])
    np.testing.assert_allclose(hidden[:, 10:], alone, atol=3e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch=0, capacity=8), "batch=0"),
        (dict(batch=1, capacity=0), "capacity=0"),
        (dict(batch=1, capacity=8, sinks=2), "needs a window"),
        (dict(batch=1, capacity=8, window=0), "window=0"),
        (dict(batch=1, capacity=8, max_append=0), "max_append=0"),
    ],
)
def test_caches_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        CausalLM(learned(), rngs=nnx.Rngs(0)).init_cache(**arguments)
