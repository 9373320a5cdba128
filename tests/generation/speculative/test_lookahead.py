"""Lookahead decoding: the same tokens, sampled ones too; its pool and its window."""

import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.runs import Task, rows_of
from tiny_models import model, spec

from jaxinf.generation import SamplingParams
from jaxinf.generation.speculative import Draft, Lookahead, Verified, lookahead
from pallas_kernels.errors import InputError

PROMPTS = [[1, 2, 3], list(range(1, 31)), [5] * 12, [9]]
LIMITS = [24, 9, 1, 24]


@pytest.mark.parametrize("temperature", [None, 0.6])
def test_rows_are_those_of_plain_decoding(temperature: float | None) -> None:
    net = model(spec(window=6))
    params = [SamplingParams(), *[SamplingParams(temperature=temperature or 0.0)] * 3]
    task = Task(net, PROMPTS, LIMITS, params, seeds=[4, 5, 6, 7], eos=[7])
    one, after, written = task.drafted(Lookahead())
    got = rows_of(one, written)
    assert got == rows_of(task.plain)
    assert after.tally.accepted.sum() > 0
    assert after.cache.lengths.tolist() == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, got, strict=True)]


def test_the_pool_keeps_the_latest_of_each_first_token() -> None:
    pool = jnp.full((2, 4, 2, 3), -1, jnp.int32)
    both = jnp.ones(2, bool)
    for gram in ([5, 1, 1], [5, 2, 2], [1, 7, 7], [5, 1, 1]):  # 1 and 5 share a bucket
        pool = lookahead.insert(pool, jnp.asarray([gram, gram], jnp.int32), both)
    pool = lookahead.insert(pool, jnp.asarray([[3, 3, 3]] * 2, jnp.int32), jnp.asarray([True, False]))
    found, known = lookahead.lookup(pool, jnp.asarray([5, 5]))
    assert found[0, 0].tolist() == [5, 1, 1]
    assert known.tolist() == [[True, False]] * 2
    found, known = lookahead.lookup(pool, jnp.asarray([1, 1]))
    assert found[0, 0].tolist() == [1, 7, 7]
    _, known = lookahead.lookup(pool, jnp.asarray([3, 3]))
    assert known.tolist() == [[True, False], [False, False]]
    again = lookahead.insert(pool, jnp.asarray([[5, 1, 1]] * 2, jnp.int32), both)
    assert np.array_equal(again, pool)


def test_a_guess_sees_its_column_and_the_first_level_before_it() -> None:
    drafter = Lookahead(tokens=3, columns=3, branches=2)
    sees = drafter._sees()
    depths = sees.sum(-1) - 1
    assert depths.tolist() == [0, 1, 2, 3, 2, 3, 4, 3, 4, 5, 1, 2, 3, 1, 2, 3]
    assert np.flatnonzero(sees[8]).tolist() == [0, 1, 2, 5, 8]  # level 2, column 1
    assert np.flatnonzero(sees[15]).tolist() == [0, 13, 14, 15]
    assert not np.triu(sees, 1).any()


def test_the_window_moves_with_what_was_written() -> None:
    drafter = Lookahead(tokens=2, columns=3, branches=1, buckets=16, ways=2)
    window = jnp.asarray([[[10, 11, 12], [20, 21, 22]]] * 3, jnp.int32)
    state = lookahead.Guesses(window, drafter.init(model(spec()), 3, 8).pool)
    choices = jnp.asarray([[0, 0, 0, 0, 31, 32, 33, 0, 0]] * 3, jnp.int32)
    counts = jnp.asarray([1, 2, 0], jnp.int32)
    none: object = None
    verified = Verified(Draft(jnp.zeros((3, 8), jnp.int32)), none, counts, none, choices, none, none, none, none)  # type: ignore[arg-type]
    after = drafter.commit(model(spec()), state, verified)
    assert after.window[0].tolist() == [[20, 21, 22], [31, 32, 33]]
    assert after.window[1].tolist() == [[21, 22, -1], [32, 33, -1]]
    assert after.window[2].tolist() == window[2].tolist()
    found, known = lookahead.lookup(after.pool, jnp.asarray([11, 11, 11]))
    assert found[0, 0].tolist() == [11, 21, 32]
    assert known[:, 0].tolist() == [True, True, False]


def test_prompts_fill_the_pool() -> None:
    drafter = Lookahead(buckets=16)
    tokens = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 0]], jnp.int32)
    state = drafter.init(model(spec()), 2, 8)
    pool = drafter.read(None, state, tokens, jnp.asarray([4, 3]), None, fresh=True).pool
    found, known = lookahead.lookup(pool, jnp.asarray([2, 6]))
    assert found[0, 0].tolist() == [2, 3, 4]
    assert known.tolist() == [[True, False, False, False], [False] * 4]
    assert np.all(np.asarray(Lookahead(prompts=False).read(None, state, tokens, None, None, fresh=True).pool) < 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(columns=6), r"18 nodes; a pass takes 15"),
        (dict(tokens=0), "tokens=0"),
        (dict(columns=2, branches=5), r"branches=5 must be at most ways=4"),
        (dict(buckets=0), "buckets=0"),
    ],
)
def test_bad_input(options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Lookahead(**options).check(model(spec()))
