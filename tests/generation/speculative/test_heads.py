"""Medusa and Eagle: drafts are what the heads say of the whole text, and the output is the target's."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from generation.speculative.runs import Task, rows_of

from jaxinf.generation import SamplingParams
from jaxinf.generation.sampling import Controls
from jaxinf.generation.speculative import (
    Costs,
    Eagle,
    EagleTree,
    Medusa,
    best_paths,
    chain_paths,
    expected_tokens,
)
from jaxinf.generation.speculative.loop import view_of
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models.drafting import EagleHead, EagleSpec, MedusaHeads, MedusaSpec, fingerprint
from jaxinf.training.drafters.tasks import EagleTask
from pallas_kernels.errors import InputError

LAYER = LayerSpec(AttentionSpec(2, 1, 16, rope=RopeSpec(16)), FFNSpec(32))
RANKS = ((0.5, 0.3, 0.1), (0.4, 0.3, 0.1), (0.3, 0.2, 0.1))
PROMPTS = [[1, 2, 3, 4, 0, 2], [3], [4, 1, 0]]
NEVER = Costs(1e9)  # drafting never pays


def eagle(modules: int = 1) -> EagleHead:
    return EagleHead(EagleSpec(32, LAYER, modules=modules), rngs=nnx.Rngs(5))


MEDUSA = MedusaHeads(MedusaSpec(32, heads=3), rngs=nnx.Rngs(5))
DRAFTERS = {
    "medusa chain": Medusa(MEDUSA, chain_paths(3)),
    "medusa tree": Medusa(MEDUSA, best_paths(RANKS, 7)),
    "eagle": Eagle(eagle(), 4),
    "eagle, sure": Eagle(eagle(), 4, confidence=0.3),
    "mtp": Eagle(eagle(2), 3),
    "mtp of three": Eagle(eagle(3), 4),
    "eagle tree": EagleTree(eagle(), 6, levels=3, width=2),
}
QUICK = ("medusa tree", "eagle", "mtp of three", "eagle tree")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DRAFTERS]


@cache
def target():
    # Of few tokens, so that what heads guess at random stands now and then.
    return tiny_models.model(tiny_models.spec(vocab=5, window=6), gain=1.5)


@cache
def task(temperature: float = 0.0) -> Task:
    return Task(target(), PROMPTS, [24, 13, 20], SamplingParams(temperature=temperature))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_plain_ones(name):
    one, state, written = task().drafted(DRAFTERS[name])
    assert rows_of(one, written) == rows_of(task().plain)
    assert 0 < state.tally.accepted.sum() < state.tally.offered.sum()


GIVEN = ["eagle tree", *(pytest.param(name, marks=pytest.mark.slow) for name in ("medusa tree", "mtp"))]


@pytest.mark.parametrize("name", GIVEN)
def test_given_candidates_leave_the_draws_as_they_are(name):
    one, state, written = task(0.8).drafted(DRAFTERS[name])
    assert rows_of(one, written) == rows_of(task(0.8).plain)
    assert state.tally.accepted.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_plain_passes_leave_no_gap(name):
    """Long stretches without drafts: what the heads have not read piles up and is read in time."""
    one, state, written = task().drafted(DRAFTERS[name], costs=NEVER)
    assert rows_of(one, written) == rows_of(task().plain)
    assert (state.tally.plain >= state.tally.passes - 1).all()


def drafted_next(name: str, steps: int, costs=None):
    """`(texts, the next draft)` after some passes, of rows that go on; a text is a prompt and all its output."""
    _, state, _ = task().drafted(DRAFTERS[name], steps=steps, costs=costs)
    view = view_of(state, jnp.int32(DRAFTERS[name].depth), Controls(), ())
    draft, _, _ = jax.jit(lambda d, t, s, v: d.draft(t, s, v))(DRAFTERS[name], target(), state.drafter, view)
    lengths = np.asarray(state.rows.cache.lengths) + 1
    on = np.flatnonzero(~np.asarray(state.rows.finished))
    assert len(on)
    return [list(map(int, state.history[i, : lengths[i]])) for i in on], jax.tree.map(lambda x: x[on], draft)


@cache
def said(name: str, depth: int):
    """The drafts of every place of a text at once, as training has them."""
    drafter = DRAFTERS[name]
    head = drafter.heads if isinstance(drafter, Medusa) else drafter.head
    task = EagleTask(head.spec)
    return jax.jit(
        lambda rows: [jax.nn.log_softmax(target().logits(x)) for x in task.drafts(head, target(), rows, depth)]
    )


def after(name: str, text: list[int], branch: list[int]) -> np.ndarray:
    """The head's log-distribution after a text and a branch of drafted tokens, `[V]`."""
    rows = np.zeros((1, 48), np.int32)
    whole = [*text, *branch]
    rows[0, : len(whole)] = whole
    return np.asarray(said(name, DRAFTERS[name].depth)(rows)[len(branch)][0, len(whole) - 2])


@pytest.mark.parametrize(
    ("name", "steps", "costs"),
    [("eagle", 4, None), ("mtp of three", 3, None), pytest.param("eagle", 19, NEVER, marks=pytest.mark.slow)],
)
def test_a_chain_is_what_the_head_says_of_the_text(name, steps, costs):
    """Keys read in pieces, some again after a draft, give what the whole text gives."""
    texts, draft = drafted_next(name, steps, costs)
    for text, tokens in zip(texts, np.asarray(draft.tokens), strict=True):
        for s, token in enumerate(tokens):
            assert token == np.argmax(after(name, text, list(map(int, tokens[:s]))))


def branches(tokens, parents) -> set[tuple[int, ...]]:
    found = [()]
    for token, parent in zip(tokens, parents, strict=True):
        assert parent < len(found)
        found.append((*found[parent], int(token)))
    assert len(set(found)) == len(found)
    return set(found[1:])


def test_a_tree_grows_where_the_head_is_sure():
    """EAGLE-2 by its definition, every distribution from the whole text."""
    drafter = DRAFTERS["eagle tree"]
    texts, draft = drafted_next("eagle tree", 3)
    for row, text in enumerate(texts):
        level, everything = {(): 0.0}, {}
        for _ in range(drafter.levels):
            children = {}
            for path, joint in level.items():
                scores = after("eagle tree", text, list(path))
                for token in np.argsort(-scores)[: drafter.width]:
                    children[(*path, int(token))] = joint + scores[token]
            everything |= children
            level = dict(sorted(children.items(), key=lambda x: -x[1])[: drafter.width])
        best = sorted(everything, key=lambda path: -everything[path])[: drafter.nodes]
        assert branches(draft.tokens[row], draft.parents[row]) == set(best)


def test_medusa_drafts_the_likeliest_of_every_head():
    texts, draft = drafted_next("medusa tree", 3)
    drafter = DRAFTERS["medusa tree"]
    for row, text in enumerate(texts):
        hidden = target().hidden(jnp.asarray([text[:-1]], jnp.int32))[0][0, -1]
        order = np.argsort(-np.asarray(target().logits(MEDUSA(hidden))), axis=-1)
        want = {tuple(int(order[s, r]) for s, r in enumerate(path)) for path in drafter.paths}
        assert branches(draft.tokens[row], draft.parents[row]) == want


def test_the_best_tree_is_the_best():
    paths = best_paths(RANKS, 4)
    assert paths == ((0,), (1,), (0, 0), (1, 0)) or paths == ((0,), (1,), (0, 0), (0, 1))
    every = [p for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)]
    trees = [t for t in itertools.combinations(every, 4) if all(p[:-1] in t or len(p) == 1 for p in t)]
    assert expected_tokens(RANKS, paths) == pytest.approx(max(expected_tokens(RANKS, t) for t in trees))
    assert expected_tokens(RANKS, chain_paths(3)) == pytest.approx(1 + 0.5 + 0.2 + 0.06)
    assert len(best_paths(RANKS, 15)) == 15
    assert best_paths(((0.9,), (0.8,)), 15) == ((0,), (0, 0))


def test_what_does_not_fit_is_refused():
    def says(drafter, match: str) -> None:
        with pytest.raises(InputError, match=match):
            drafter.check(target())

    says(Medusa(MEDUSA, chain_paths(4)), "a tree of depth 4 needs as many heads; there are 3")
    says(Medusa(MEDUSA, ((0, 0), (0,))), "after its parent")
    says(Medusa(MEDUSA, ((0,), (0,))), "every node once")
    says(Medusa(MedusaHeads(MedusaSpec(64), rngs=nnx.Rngs(0))), "d_model=64, but the target has 32")
    says(Eagle(eagle(), 16), "draft_tokens=16 must be a whole number from 1 to 15")
    says(Eagle(eagle(), target="0123456789abcdef"), "were trained for another model")
    says(EagleTree(eagle(), 6, levels=6, width=4), "has the head read 20 candidates, but at most 16")
    says(EagleTree(eagle(), 9, levels=2, width=2), "draft_tokens=9 is more than the 6 candidates")
    says(EagleTree(eagle(2), 4), "heads of one module")
    Eagle(eagle(), target=fingerprint(target())).check(target())
    with pytest.raises(InputError, match="must be a whole number from 1 to 15"):
        best_paths(RANKS, 0)
    assert Medusa.of(MEDUSA, RANKS, tokens=5).paths == best_paths(RANKS, 5)
    assert Medusa.of(MEDUSA).paths == chain_paths(3)
