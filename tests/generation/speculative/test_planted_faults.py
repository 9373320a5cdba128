"""The proofs can fail: faults planted in drafters and in the loop are found by them, at no larger samples."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.drafters import CHAIN, DRAFTERS, sampled_tree, table_tree
from generation.speculative.laws import DEPTH, LEVEL, SAMPLES, SETTINGS, Counter, chi_square, seeds_of, small
from generation.speculative.runs import Task, rows_of, speculation
from tiny_models import model, spec

from jaxinf.cache import Cache
from jaxinf.generation.sampling import row_keys
from jaxinf.generation.speculative import View, accept, loop
from jaxinf.generation.speculative.drafter import categorical

ASKED = SAMPLES // 16  # what the quick proofs have
PAIR = CHAIN[:DEPTH]
SEED = seeds_of("faults", 1)[0]
WARM = [SETTINGS["temperature"]]
LARGEST = LEVEL / (5 * len(SETTINGS) * len(DRAFTERS))
"""The chance below which a proof fails."""


def chance(counter: Counter, name: str, drafter, samples: int = ASKED) -> float:
    found, _, (accepted, offered) = counter(name, drafter, SEED, samples, rows=1024)
    assert 0 < accepted <= offered
    return chi_square(found[0], counter.laws[0])


def test_wrong_probabilities_are_found() -> None:
    """Flattened, or of another temperature; the same program finds nothing where they are right."""
    counter = Counter(small(), WARM)
    honest = sampled_tree(counter.target, 0, PAIR)
    # Numbers as arrays, so that all of them have one program.
    honest = dataclasses.replace(honest, power=jnp.float32(1.0), flat=jnp.float32(0.0))
    assert chance(counter, "reported", honest) > LARGEST
    for fault in (dict(flat=0.2), dict(power=0.8), dict(power=1.3)):
        wrong = dataclasses.replace(honest, **{k: jnp.float32(v) for k, v in fault.items()})
        assert chance(counter, "reported", wrong) < LARGEST, fault


QUICK = ("no residual", "a branch is not moved")


def no_residual(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accept, "residual", lambda p, q: p)


def last_of_another_node(patch: pytest.MonkeyPatch) -> None:
    """What follows the last node is drawn as what follows the one before it."""
    true = accept.Judge.distributions

    def wrong(self, draft, logits):
        p = true(self, draft, logits)
        return p.at[:, -1].set(p[:, -2])

    patch.setattr(accept.Judge, "distributions", wrong)


def judged_with_the_drafts_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accept, "_JUDGES", 1)


def drafted_with_the_targets_noise(patch: pytest.MonkeyPatch) -> None:
    """Candidates are drawn with the keys of the tokens that may have to be drawn instead."""

    def draw(self, processed, node):
        return categorical(row_keys(self.seeds, self.emitted + node - 1), processed)

    patch.setattr(View, "draw", draw)


def always_standing(patch: pytest.MonkeyPatch) -> None:
    """Candidates stand wherever the target gives them any chance."""
    patch.setattr(jax.random, "uniform", lambda key, shape=(), dtype=jnp.float32, **_: jnp.zeros(shape, dtype))


def one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    true = Cache.roll_back
    patch.setattr(Cache, "roll_back", lambda self, lengths: true(self, lengths + 1))


def one_token_too_few(patch: pytest.MonkeyPatch) -> None:
    true = Cache.roll_back
    patch.setattr(Cache, "roll_back", lambda self, lengths: true(self, lengths - 1))


def another_branch(patch: pytest.MonkeyPatch) -> None:
    """The first columns stay, wherever the accepted ones are."""
    true = Cache.commit

    def wrong(self, path, counts):
        return true(self, jnp.broadcast_to(jnp.arange(path.shape[1]), path.shape), counts)

    patch.setattr(Cache, "commit", wrong)


def a_branch_not_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cache, "commit", lambda self, path, counts: self.roll_back(self.lengths + counts))


def last_token_of_the_node_before(patch: pytest.MonkeyPatch) -> None:
    true = loop.by_equality

    def wrong(judge, draft, logits, depth):
        found = true(judge, draft, logits, depth)
        before = jnp.take_along_axis(found.tokens, jnp.maximum(found.counts - 2, 0)[:, None], 1)
        last = jnp.arange(found.tokens.shape[1]) == found.counts[:, None] - 1
        return dataclasses.replace(found, tokens=jnp.where(last, before, found.tokens))

    patch.setattr(loop, "by_equality", wrong)


def counted_children_of_others(patch: pytest.MonkeyPatch) -> None:
    """A candidate is compared with what follows the root, wherever it hangs."""
    true = loop.by_equality

    def wrong(judge, draft, logits, depth):
        return true(judge, draft, jnp.broadcast_to(logits[:, :1], logits.shape), depth)

    patch.setattr(loop, "by_equality", wrong)


IN_LAW = {
    "no residual": (no_residual, PAIR),
    "no residual among siblings": (no_residual, (0, 0, 1)),
    "last token of another node": (last_of_another_node, PAIR),
    "judged with the draft's noise": (judged_with_the_drafts_noise, PAIR),
    "drafted with the target's noise": (drafted_with_the_targets_noise, PAIR),
    "everything stands": (always_standing, PAIR),
    "roll-back too long": (one_token_too_many, PAIR),
    "roll-back too short": (one_token_too_few, PAIR),
    "another branch stays": (another_branch, (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in IN_LAW])
def test_another_distribution_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, parents = IN_LAW[name]
    counter = Counter(small(), WARM)
    drafter = sampled_tree(counter.target, 0, parents)
    plant(monkeypatch)
    assert chance(counter, name, drafter, ASKED if name in QUICK else SAMPLES) < LARGEST


IN_TOKENS = {
    "roll-back too long": (one_token_too_many, CHAIN),
    "roll-back too short": (one_token_too_few, CHAIN),
    "another branch stays": (another_branch, (0, 0, 2)),
    "a branch is not moved": (a_branch_not_moved, (0, 0, 2)),
    "last token of another node": (last_token_of_the_node_before, CHAIN),
    "judged as if after the root": (counted_children_of_others, (0, 0, 2)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in IN_TOKENS])
def test_other_tokens_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, parents = IN_TOKENS[name]
    net = model(spec(vocab=16, layers=1), gain=1.3)
    task = Task(net, [[1, 2, 3], [5, 6, 7, 8, 9], [3], [4, 4]], [24] * 4)
    plain = rows_of(task.plain)
    drafter = table_tree(net, 0, parents)
    plant(monkeypatch)
    one, state, written = task.drafted(drafter, program=speculation())
    assert state.tally.accepted.any()
    wrong = [a != b for a, b in zip(rows_of(one, written), plain, strict=True)]
    assert np.mean(wrong) >= 0.5
