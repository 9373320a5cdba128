"""The steps, the loop and the host's side of it, with tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import counted, model, spec, whole

import jaxinf
from jaxinf.generation import PIECE, Controls, Runner, SamplingParams, buckets, generate, target_logprobs
from jaxinf.models.causal_lm import init_cache

PROMPTS = [[1, 2, 3], list(range(1, 31)), [5] * 12, [9]]
LIMITS = [12, 9, 1, 12]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(model(spec(window=6)))


def run(runner: Runner, prompts, *, limits=None, params=None, seeds=None, steps=5, **options):
    """New tokens of each row, and the batch."""
    rows = len(prompts) * options.get("samples", 1)
    limits = limits or [12] * rows
    params = params or [SamplingParams()] * rows
    cache = runner.new_cache(len(prompts), max(map(len, prompts)) + max(limits) - 1, limit=512)
    batch = runner.begin(prompts, cache, limits=limits, params=params, seeds=seeds or [0] * rows, **options)
    rows_out = [[] for _ in range(rows)]
    while True:
        for row, out in enumerate(rows_out):
            out += batch.written.tokens[row, : batch.written.counts[row]].tolist()
        if batch.finished.all():
            return rows_out, batch
        batch.advance(steps)


def test_public_steps_give_the_logits_of_a_whole_pass() -> None:
    net = model(spec(window=6))
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 0, 0]], jnp.int32)
    counts = jnp.asarray([5, 3], jnp.int32)
    want = whole(net, tokens)
    logits, cache = jax.jit(jaxinf.prefill, donate_argnames="cache")(net, tokens, counts, net.init_cache(2, 16))
    assert (logits.shape, logits.dtype) == ((2, 64), jnp.float32)
    step = jax.jit(jaxinf.decode_step, donate_argnames="cache")
    for t in range(3):
        for row in range(2):
            np.testing.assert_allclose(logits[row], want[row, counts[row] - 1 + t], atol=1e-4)
        logits, cache = step(net, tokens[jnp.arange(2), counts + t], cache)
    assert cache.lengths.tolist() == [8, 6]


@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_ragged_rows_give_what_they_give_alone(runner: Runner, temperature: float) -> None:
    params = [SamplingParams(temperature=temperature)] * 4
    seeds = [4, 4, 11, 4]
    together, batch = run(runner, PROMPTS, limits=LIMITS, params=params, seeds=seeds)
    assert [len(row) for row in together] == LIMITS
    for i in range(4):
        alone, _ = run(
            runner, PROMPTS[i : i + 1], limits=LIMITS[i : i + 1], params=params[:1], seeds=seeds[i : i + 1]
        )
        assert alone[0] == together[i]
    # A row's last token is not stored, and a finished row stores nothing more.
    assert batch.state.cache.lengths.tolist() == [
        len(p) + limit - 1 for p, limit in zip(PROMPTS, LIMITS, strict=True)
    ]


def test_a_row_does_not_depend_on_its_neighbours(runner: Runner) -> None:
    params = [SamplingParams(temperature=1.1)] * 4
    before, _ = run(runner, PROMPTS, params=params, seeds=[3] * 4)
    others = [PROMPTS[0], [60] * 30, [7, 7], [8] * 9]
    after, _ = run(runner, others, params=params, seeds=[3, 8, 9, 10])
    assert before[0] == after[0]
    assert before[1:] != after[1:]
    assert before[0] != run(runner, PROMPTS, params=params, seeds=[4] * 4)[0][0]


def test_calls_of_any_size_give_the_same_tokens(runner: Runner) -> None:
    params = [SamplingParams(temperature=1.1)] * 4
    assert len({str(run(runner, PROMPTS, params=params, steps=steps)[0]) for steps in (1, 4, 64)}) == 1


def test_other_temperatures_need_no_new_program(runner: Runner) -> None:
    def sampled(*temperatures, top_p):
        return run(runner, PROMPTS, params=[SamplingParams(temperature=t, top_p=top_p) for t in temperatures])

    sampled(1.0, 0.5, 0.0, 2.0, top_p=0.9)
    with counted() as programs:
        sampled(0.3, 0.3, 0.9, 0.0, top_p=0.4)
    assert programs == []


def test_eos_ids_end_rows(runner: Runner) -> None:
    free, _ = run(runner, PROMPTS[:2], limits=[12, 12])
    ends = [free[0][4], free[1][7]]
    got, batch = run(runner, PROMPTS[:2], limits=[12, 12], eos=ends)
    for row in range(2):
        stop = min(free[row].index(e) for e in ends if e in free[row])
        assert got[row] == free[row][: stop + 1]
    assert batch.state.cache.lengths.tolist() == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, got, strict=False)]


def test_samples_of_a_prompt_are_rows_with_its_seeds(runner: Runner) -> None:
    params = [SamplingParams(temperature=1.1)] * 4
    got, _ = run(runner, PROMPTS[:2], samples=2, params=params, seeds=[1, 2, 3, 4])
    alone, _ = run(runner, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], params=params, seeds=[1, 2, 3, 4])
    assert got == alone


def test_penalty_sees_prompt_and_output(runner: Runner) -> None:
    params = [SamplingParams(repetition_penalty=50.0)] * 2
    got, _ = run(runner, PROMPTS[:2], params=params)
    for prompt, row in zip(PROMPTS, got, strict=False):
        x = prompt + row
        logits = whole(runner.model, jnp.asarray([x], jnp.int32))[0]
        for t in range(len(prompt), len(x)):
            scores = np.asarray(logits[t - 1], np.float64)
            seen = np.unique(x[:t])
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * 50, scores[seen] / 50)
            assert x[t] == np.argmax(scores)


def test_logprobs_are_those_of_a_whole_pass(runner: Runner) -> None:
    params = [SamplingParams(temperature=1.7, top_p=0.9)] * 2
    cache = runner.new_cache(2, 64)
    options = dict(limits=[6, 6], params=params, seeds=[0, 1], logprobs=3)
    batch = runner.begin(PROMPTS[:2], cache, **options)
    parts = [batch.written, batch.advance(5)]
    tokens, chosen, top_ids, top = (
        np.concatenate([getattr(p, name)[:, :n] for p, n in zip(parts, (1, 5), strict=True)], axis=1)
        for name in ("tokens", "logprobs", "top_ids", "top_logprobs")
    )
    for row, prompt in enumerate(PROMPTS[:2]):
        logits = whole(runner.model, jnp.asarray([prompt + tokens[row].tolist()], jnp.int32))[0]
        scores = np.asarray(jax.nn.log_softmax(logits, axis=-1))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(chosen[row], scores[np.arange(6), tokens[row]], atol=1e-4)
        order = np.argsort(-scores, axis=-1)[:, :3]
        assert np.array_equal(top_ids[row], order)
        np.testing.assert_allclose(top[row], np.take_along_axis(scores, order, axis=1), atol=1e-4)


@pytest.mark.parametrize("layout", ["list", "stacked"])
@pytest.mark.parametrize("kind", [dict(capacity=64), dict(capacity=512, window=9, sinks=3)])
def test_pieces_of_a_prompt_give_what_the_whole_gives(layout: str, kind: dict) -> None:
    net = model(spec(window=6), layout=layout)
    tokens = jax.random.randint(jax.random.key(1), (3, 37), 0, 64, jnp.int32)
    counts = jnp.asarray([37, 3, 20], jnp.int32)
    program = jax.jit(generate, static_argnames=("max_new_tokens", "piece"), donate_argnames="cache")
    got = [program(net, tokens, counts, net.init_cache(3, **kind), max_new_tokens=7, piece=p) for p in (512, 8)]
    assert np.array_equal(got[0][1].tokens, got[1][1].tokens)
    assert got[0][0].cache.lengths.tolist() == got[1][0].cache.lengths.tolist() == [43, 9, 26]
    for a, b in zip(jax.tree.leaves(got[0][0].cache), jax.tree.leaves(got[1][0].cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_the_host_takes_long_prompts_in_pieces() -> None:
    net = Runner(model(spec(window=6, context=2048)))
    prompts = [np.random.default_rng(0).integers(0, 64, n).tolist() for n in (2 * PIECE + 20, PIECE, 3)]
    got, _ = run(net, prompts, limits=[3, 3, 3])
    program = jax.jit(generate, static_argnames=("max_new_tokens", "piece"))
    tokens = np.zeros((3, 2 * PIECE + 20), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    counts = np.asarray([len(p) for p in prompts], np.int32)
    cache = net.model.init_cache(3, 2048)
    _, written = program(net.model, tokens, counts, cache, max_new_tokens=3, piece=4096)
    assert written.tokens.tolist() == got


def test_one_function_gives_what_the_host_gives(runner: Runner) -> None:
    params = [SamplingParams(temperature=0.9, repetition_penalty=1.2, top_k=20)] * 4
    got, _ = run(runner, PROMPTS, limits=LIMITS, params=params, seeds=[1, 2, 3, 4])
    tokens = np.zeros((4, 30), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    _, written = jax.jit(generate, static_argnames="max_new_tokens")(
        runner.model,
        tokens,
        np.asarray([3, 30, 12, 1], np.int32),
        runner.new_cache(4, 64),
        max_new_tokens=12,
        limits=np.asarray(LIMITS, np.int32),
        seeds=np.arange(1, 5, dtype=np.uint32),
        controls=Controls.of(params),
    )
    assert [row[:n] for row, n in zip(written.tokens.tolist(), written.counts.tolist(), strict=True)] == got


DENSE, ROLLING, SINKS = (
    dict(capacity=4096),
    dict(capacity=2**20, window=4096),
    dict(capacity=2**20, window=4096, sinks=4),
)


# Narrow caches are smaller beside the same blocks that are widened.
NARROW = [
    ("list", DENSE | dict(kind="int8"), 60, "bfloat16"),
    ("stacked", ROLLING | dict(kind="int8"), 60, "float32"),
    ("stacked", DENSE | dict(kind="fp8"), 60, "float32"),
    ("stacked", DENSE | dict(kind="int4"), 100, "float32"),
    ("stacked", ROLLING | dict(kind="int4"), 100, "float32"),
]


@pytest.mark.parametrize(
    ("layout", "kind", "layers", "dtype"),
    [
        ("list", DENSE, 8, "float32"),
        ("list", SINKS, 16, "float32"),  # a sink cache holds a rolling one
        ("stacked", DENSE, 20, "float32"),
        ("stacked", ROLLING, 20, "float32"),
        ("stacked", SINKS, 20, "float32"),
        ("list", DENSE, 40, "bfloat16"),
        ("stacked", DENSE, 40, "bfloat16"),
        ("stacked", DENSE | dict(kind="int8"), 60, "float32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in NARROW),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_the_cache_is_never_copied(layout: str, kind: dict, layers: int, dtype: str) -> None:
    """Ragged prefill in pieces and decoding, as one program: temporaries stay below a tenth of the cache.

    A pass over a later piece of the prompt needs room for one layer's window, so there must be some layers.
    """
    shape = spec(layers=1, repeats=layers)
    weights = jax.eval_shape(lambda: model(shape, layout=layout))
    cache = jax.eval_shape(lambda: init_cache(shape, 4, dtype=jnp.dtype(dtype), layout=layout, **kind))
    program = jax.jit(generate, static_argnames=("max_new_tokens", "piece"), donate_argnames="cache")
    ints = jax.ShapeDtypeStruct((4,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((4, 80), jnp.int32)
    lowered = program.lower(weights, tokens, ints, cache, max_new_tokens=8, piece=32, limits=ints)
    # Not at the level that the other tests compile with, where XLA does not try to write in place.
    memory = lowered.compile(compiler_options={"xla_backend_optimization_level": 2}).memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < 0.1 * cache.nbytes


def test_fifty_lengths_need_a_handful_of_programs() -> None:
    net = Runner(model(spec(context=4096)))
    with counted() as programs:
        for length in range(1, 251, 5):
            run(net, [[length % 64] * length], limits=[3])
    # Passes of 16, 32, 64, 128 and 256 tokens, the empty cache, the first token, the loop, and zeros for logits.
    assert 4 <= len(programs) <= 10


def test_sizes_cover_lengths() -> None:
    for n in [1, 15, 16, 17, 511, 512, 513, 1024, 1029, 2000]:
        parts = buckets.pieces(n)
        ends = [start + size for start, size in parts]
        assert [start for start, _ in parts] == [0, *ends[:-1]]
        assert ends[-1] >= n > parts[-1][0]
        assert all(size <= PIECE for _, size in parts)
    for n in range(1, 3000, 7):
        assert n <= buckets.capacity(n) <= max(256, 1.5 * n)
        assert n <= buckets.capacity(n, 700) <= max(700, n)
    assert len({buckets.capacity(n) for n in range(1, 32_768)}) <= 16


def test_target_logprobs_are_those_of_a_whole_pass() -> None:
    net = model(spec(window=6))
    x = jax.random.randint(jax.random.key(1), (2, 70), 0, 64, jnp.int32)
    want = jnp.take_along_axis(jax.nn.log_softmax(whole(net, x[:, :-1]), axis=-1), x[:, 1:, None], axis=-1)[..., 0]
    got, _ = jax.jit(target_logprobs)(net, x[:, :-1], x[:, 1:], jnp.asarray([69, 69], jnp.int32))
    np.testing.assert_allclose(got, want, atol=1e-4)
