"""BiLD: which tokens stand, when the small model stops, and that what is written is what the policies say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.drafters import nearly
from generation.speculative.runs import Task, rows_of
from tiny_models import model, spec, whole

from jaxinf.generation import Controls, SamplingParams
from jaxinf.generation.speculative import BigLittle, Draft, Judge, by_equality, by_threshold
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError

PROMPTS = [[1, 2, 3], list(range(1, 15)), [5] * 12, [9]]
LIMITS = [24, 9, 1, 24]


def by_hand(target: CausalLM, small: CausalLM, row: list[int], limit: int, drafter: BigLittle) -> list[int]:
    """The policies on whole texts, without caches: a pass a round."""

    def after(net: CausalLM, text: list[int]) -> np.ndarray:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(jax.nn.log_softmax(whole(net, jnp.asarray(padded))[0, len(text) - 1]))

    start, text = len(row), [*row, int(np.argmax(after(target, row)))]
    while len(text) - start < limit:
        drafted: list[int] = []
        while len(drafted) < min(drafter.tokens, limit - (len(text) - start) - 1):
            scores = after(small, text + drafted)
            if np.exp(scores.max()) < drafter.fallback:
                break
            drafted.append(int(np.argmax(scores)))
        for token in drafted:
            if -after(target, text)[token] > drafter.rollback:
                break
            text.append(token)
        text.append(int(np.argmax(after(target, text))))
    return text[start:]


def test_rows_follow_both_policies() -> None:
    net = model(spec(window=6), gain=1.5)
    small = nearly(net, 0, noise=0.3)
    drafter = BigLittle(small, tokens=3, fallback=0.05, rollback=3.0)
    drafter.check(net)
    task = Task(net, PROMPTS, LIMITS)
    one, after, written = task.drafted(drafter)
    got = rows_of(one, written)
    assert got == [by_hand(net, small, p, n, drafter) for p, n in zip(PROMPTS, LIMITS, strict=True)]
    assert got != rows_of(task.plain)
    accepted, offered = after.tally.accepted.sum(0), after.tally.offered.sum(0)
    assert 0 < accepted[0] < offered[0] < after.tally.passes.sum()  # some were refused, some never written
    assert after.cache.lengths.tolist() == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, got, strict=True)]


def judge(rows: int, **controls) -> Judge:
    zeros = jnp.zeros((rows,), jnp.int32)
    return Judge(zeros, zeros.astype(jnp.uint32), zeros, Controls(**controls))


def test_what_stands_is_likely_enough() -> None:
    logits = jnp.log(jnp.asarray([[[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]] * 3))
    draft = Draft(jnp.asarray([[1, 1], [1, 0], [2, 1]], jnp.int32))
    accepted = by_threshold(judge(3), draft, logits, 2, distance=-float(np.log(0.25)))
    assert accepted.counts.tolist() == [3, 2, 1]
    assert [accepted.tokens[i, :n].tolist() for i, n in enumerate((3, 2, 1))] == [[1, 1, 1], [1, 2], [0]]
    few = dataclasses.replace(draft, counts=jnp.asarray([1, 0, 2]))
    assert by_threshold(judge(3), few, logits, 2, distance=9.0).counts.tolist() == [2, 1, 3]


def test_a_tree_follows_the_first_child_that_stands() -> None:
    logits = jnp.log(jnp.asarray([[[0.1, 0.5, 0.4], [0.4, 0.4, 0.2], [0.9, 0.05, 0.05]]]))
    draft = Draft(jnp.asarray([[0, 2]], jnp.int32), parents=jnp.asarray([[0, 0]]))
    accepted = by_threshold(judge(1), draft, logits, 1, distance=1.0)
    assert (accepted.path.tolist(), accepted.tokens.tolist()) == ([[0, 2]], [[2, 0]])


def test_nothing_but_certainty_stands_at_zero_and_everything_at_infinity() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 4, 7)), jnp.float32)
    draft = Draft(jnp.asarray(rng.integers(0, 7, (5, 3)), jnp.int32))
    warm = judge(5, temperature=jnp.full((5,), 0.7))
    assert by_threshold(warm, draft, logits, 3, distance=float("inf")).counts.tolist() == [4] * 5
    none = by_threshold(warm, draft, logits, 3, distance=0.0)
    assert none.counts.tolist() == [1] * 5
    assert none.tokens[:, 0].tolist() == by_equality(warm, draft, logits, 3).tokens[:, 0].tolist()


def test_it_says_that_it_is_not_exact() -> None:
    assert not BigLittle.exact
    assert "NOT exact" in (BigLittle.__doc__ or "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(tokens=0), "draft_tokens=0"),
        (dict(fallback=1.0), "fallback=1.0"),
        (dict(rollback=-1.0), "rollback=-1.0"),
        (dict(rollback=float("nan")), "rollback=nan"),
    ],
)
def test_bad_input(options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        BigLittle(model(spec()), **options).check(model(spec()))


def test_sampled_rows_are_written() -> None:
    net = model(spec(window=6))
    task = Task(net, PROMPTS, LIMITS, SamplingParams(temperature=0.8))
    one, after, written = task.drafted(BigLittle(nearly(net, 0), tokens=3, fallback=0.0, rollback=float("inf")))
    assert [len(row) for row in rows_of(one, written)] == LIMITS
    assert after.tally.accepted.tolist() == after.tally.offered.tolist()
