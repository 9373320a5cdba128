"""How much is drafted: the formula, text that cannot be predicted, and one program whatever happens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.drafters import DRAFTERS, TREE, nearly, table_tree
from generation.speculative.runs import Task, rows_of, speculation
from tiny_models import counted, model, spec

from jaxinf.generation.loop import State
from jaxinf.generation.sampling import Controls
from jaxinf.generation.speculative import Costs, DraftModel, Policy, PromptLookup, begin, decode, policy
from jaxinf.models.causal_lm import init_cache

DEPTH = 5
ONE = jnp.ones((1,), bool)
LEFT = jnp.full((1,), 100)


def known(rate: float, *, chain: bool = True, steps: bool = True) -> Policy:
    """A policy that has seen drafted tokens stand at this rate."""
    each = sum(rate**i for i in range(1, DEPTH + 1))
    judged = sum(rate**i for i in range(DEPTH))
    zero = jnp.zeros((), jnp.int32)
    row = (jnp.full((1,), x, jnp.float32) for x in (1e3 * each, 1e3 * judged, 1e3))
    return Policy(*row, zero, zero + 24, DEPTH, chain, steps)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 0.95])
def test_expected_gains_are_those_of_a_simulation(rate: float) -> None:
    """Tokens that come out of passes whose drafted tokens stand independently, over what the passes take."""
    costs = Costs(1.4, 0.1, 0.2)
    stands = np.random.default_rng(0).random((200_000, DEPTH)) < rate
    runs = np.cumprod(stands, axis=1)
    for length in range(1, DEPTH + 1):
        tokens = 1 + runs[:, :length].sum(axis=1)
        want = tokens.mean() / (1.4 + 0.1 + 0.2 * length)
        gains = known(rate).gains(costs, LEFT)
        np.testing.assert_allclose(gains[length - 1], want, rtol=0.01)
    for chain in (True, False):
        whole = known(rate, chain=chain, steps=False).gains(costs, LEFT)
        assert not whole[:-1].any()
        np.testing.assert_allclose(whole[-1], (1 + runs.sum(axis=1)).mean() / 2.5, rtol=0.01)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("verify", [1.05, 1.5, 2.5])
def test_the_best_length_is_taken_or_none(rate: float, verify: float) -> None:
    costs = Costs(verify, 0.0, 0.15)
    gains = [sum(rate**i for i in range(g + 1)) / (verify + 0.15 * g) for g in range(1, DEPTH + 1)]
    best = int(np.argmax(gains)) + 1 if max(gains) > policy._MARGIN else 0
    assert int(known(rate).length(costs, LEFT)) == best


def test_the_row_that_is_last_decides() -> None:
    """Of two rows one is predicted well and one never: drafts pay where the first has much more to write."""
    costs = Costs(1.5, 0.0, 0.1)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]) if a.ndim else a, known(0.9), known(0.0))
    for left, drafts in (
        ([100, 100], False),
        ([100, 10], True),
        ([10, 100], False),
        ([100, 0], True),
        ([0, 0], False),
    ):
        length = int(both.length(costs, jnp.asarray(left)))
        assert (length > 0) == drafts, left
    alone = known(0.9).gains(costs, LEFT)
    np.testing.assert_allclose(both.gains(costs, jnp.asarray([100, 10])), alone, rtol=1e-6)


KINDS = {"chain": dict(chain=True, steps=True), "whole chain": dict(chain=True, steps=False)}
KINDS["tree"] = dict(chain=False, steps=False)


@partial(jax.jit, static_argnames=("chain", "steps", "free"))
def simulated(rates: jax.Array, key: jax.Array, costs: Costs, *, chain: bool, steps: bool, free: bool = False):
    """Passes at which drafted tokens stand with probability `rates[t]`: `(tokens drafted, those that stood)`.

    free: drafts are made, and their first token judged, in plain steps too."""

    def one(state, xs):
        rate, key = xs
        length = state.length(costs, LEFT)
        stands = jnp.cumprod(jax.random.uniform(key, (DEPTH,)) < rate)
        stood = jnp.sum(stands * (jnp.arange(DEPTH) < length), dtype=jnp.int32)
        drafted = state.after_draft(costs, stood[None], length[None], ONE, LEFT)
        plain = state.after_plain(ONE, stands[:1] > 0) if free else state.after_plain()
        after = jax.tree.map(lambda a, b: jnp.where(length > 0, a, b), drafted, plain)
        return after, (length, stood)

    return jax.lax.scan(
        one, Policy.new(1, DEPTH, chain=chain, steps=steps), (rates, jax.random.split(key, len(rates)))
    )[1]


def speed(length: np.ndarray, stood: np.ndarray, costs: Costs) -> float:
    """Tokens for the time, beside plain steps."""
    time = np.where(length > 0, costs.verify + costs.fixed + costs.token * length, 1.0)
    return float((1 + stood).sum() / time.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verify", [1.1, 1.6, 3.0])
def test_text_that_cannot_be_predicted(verify: float, kind: str) -> None:
    """Plain decoding but for some passes at first and a few tries: at most a twentieth slower over 500 passes."""
    costs = Costs(verify, 0.0, 0.2)
    length, stood = jax.device_get(simulated(jnp.zeros(2000), jax.random.key(0), costs, **KINDS[kind]))
    tries = np.flatnonzero(length)
    assert not stood.any()
    assert (tries[:30] < 500).sum() < 30
    assert (length[500:] > 0).mean() < 0.01
    assert np.diff(tries)[-2:].min() > 2 * np.diff(tries)[-4:-2].min()
    assert speed(length[:500], stood[:500], costs) > 0.95
    assert speed(length, stood, costs) > 0.97


@pytest.mark.parametrize("verify", [2.0, 6.0])
def test_short_answers_are_not_slowed_by_tries(verify: float) -> None:
    """Where drafting would have to be nearly always right to pay, an answer of 64 tokens has at most one draft."""
    costs = Costs(verify, 0.0, 0.4)
    length, stood = jax.device_get(simulated(jnp.zeros(64), jax.random.key(0), costs, **KINDS["chain"]))
    assert (length > 0).sum() <= 1
    assert speed(length, stood, costs) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_can_be_predicted_again(kind: str) -> None:
    costs = Costs(1.3, 0.0, 0.1)
    rates = jnp.concatenate([jnp.full(200, 0.9), jnp.zeros(150), jnp.full(600, 0.9)])
    length, stood = jax.device_get(simulated(rates, jax.random.key(1), costs, **KINDS[kind]))
    before, between, after = np.split(length > 0, [200, 350])
    assert before.mean() > 0.95
    assert between[20:].mean() < 0.1
    assert after[-300:].mean() > 0.95
    assert speed(length[-300:], stood[-300:], costs) > 1.8


def test_drafts_that_cost_nothing_are_judged_in_plain_steps() -> None:
    """Where verifying is dear, no draft is tried, and text that repeats itself is seen all the same."""
    costs = Costs(3.5)
    rates = jnp.concatenate([jnp.full(100, 0.3), jnp.full(60, 1.0)])
    given = dict(KINDS["whole chain"], free=True)
    length, _ = jax.device_get(simulated(rates, jax.random.key(2), costs, **given))
    assert not length[:100].any()
    assert length[-30:].all()


LONG = [[1, 2, 3], list(range(1, 15)), [5] * 12]


def test_one_program_for_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting always, never, or now and then, in calls of any size: the same tokens from one compilation, and the
    draft model has read what plain steps wrote."""
    monkeypatch.setattr(policy, "_PROBE", 4)
    monkeypatch.setattr(policy, "_LONGEST_WAIT", 5)
    monkeypatch.setattr(policy, "_TRIES", 1e3)
    net = model(spec(vocab=16, layers=1), gain=1.3)
    drafter = DraftModel(nearly(net, 1), tokens=3)
    task = Task(net, LONG, [60, 50, 9], most=60)
    other = Task(net, [[7, 7], [3] * 14, [1]], [50, 60, 3], most=60)
    for one in (task, other):
        one.plain, jax.block_until_ready(one.new_cache(4))
    program, found = speculation(), []
    with counted() as programs:
        for costs in (Costs(1.0), Costs(1.5, 0.1, 0.2), Costs(100.0)):
            costs = jax.tree.map(np.float32, costs)
            for one in (task, other):
                first, state, written = one.drafted(drafter, costs=costs, program=program)
                assert rows_of(first, written) == rows_of(one.plain)
                found.append(state.tally)
    assert len([name for name in programs if name]) == program._cache_size() == 1
    always, _, mixed, _, rarely, _ = found
    assert always.plain.sum() == 0
    passes = rarely.passes[0]
    assert 0.6 * passes < rarely.plain[0] < passes - 5
    # What was drafted after plain steps stood as often as ever: nothing was missed.
    share = [t.accepted.sum() / t.offered.sum() for t in (always, rarely)]
    assert share[1] > 0.6 * share[0] > 0.2
    assert mixed.passes.sum() < rarely.passes.sum()


def loop_program(drafter, layers: int, batch: int = 4, slots: int = 4096):
    """`(decode as a jitted function that donates its state, shapes to call it with, bytes of the cache)`."""
    shape = spec(layers=1, repeats=layers)
    net = jax.eval_shape(lambda: model(shape))
    cache = jax.eval_shape(lambda: init_cache(shape, batch, slots, dtype=jnp.float32, max_append=drafter.nodes + 1))

    def start(net, cache):
        rows = jnp.zeros((batch,), jnp.int32)
        state = State(cache, rows, rows, rows + 99, rows > 0, rows.astype(jnp.uint32), None, shape.vocab)
        return begin(state, drafter, drafter.init(net, batch, slots), jnp.zeros((batch, slots), jnp.int32))

    def run(net, drafter, state, steps, costs):
        eos = jnp.full((1,), -1, jnp.int32)
        return decode(net, drafter, state, steps=steps, eos=eos, controls=Controls(), costs=costs)

    given = net, drafter, jax.eval_shape(start, net, cache), jnp.int32(9), Costs(*(jnp.ones(3)))
    return jax.jit(run, donate_argnums=2), given, cache.nbytes


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("name", DRAFTERS)
def test_no_callbacks_and_no_branches_that_copy(name: str) -> None:
    """The host is not asked for anything, and what holds the caches are loops, never a `cond`."""
    net = model(spec(layers=2))
    drafter = DRAFTERS[name](net, 0)
    program, given, _ = loop_program(drafter, 2)
    found = list(equations(program.trace(*given).jaxpr.jaxpr))
    names = {eqn.primitive.name for eqn in found}
    assert not [name for name in names if "callback" in name or "feed" in name]
    assert "while" in names
    for eqn in found:
        # Those of a platform are decided while lowering.
        if eqn.primitive.name == "cond" and eqn.params.get("branches_platforms") is None:
            assert max((v.aval.size for v in eqn.outvars), default=0) < 4096, eqn


MEASURED = ("prompt lookup", "given tree", "draft model")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "prompt lookup" else pytest.mark.slow) for n in MEASURED]
)
def test_the_loop_copies_no_cache(name: str) -> None:
    """Compiled for this CPU: temporaries below a tenth of the cache, which is written in place."""
    layers = 8
    small = model(spec(layers=1))
    made = {"given tree": table_tree(small, 0, TREE), "draft model": DraftModel(small, tokens=3)}
    program, given, size = loop_program(made.get(name) or PromptLookup(tokens=4), layers)
    # Not at the level that the other tests compile with, where XLA does not try to write in place.
    compiled = program.lower(*given).compile(compiler_options={"xla_backend_optimization_level": 2})
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.1 * size
