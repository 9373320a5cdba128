"""Both rules of acceptance against what they are defined as, node by node, and rejection's law without sampling."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinf.generation import SamplingParams, sample
from jaxinf.generation.sampling import Context, Controls, row_keys
from jaxinf.generation.speculative import Draft, Judge, accept, ancestors, by_equality, by_rejection, residual

BATCH, NODES, VOCAB = 3, 5, 4
DEPTH = NODES


def random_draft(draw: np.random.Generator, *, chain: bool = False) -> dict[str, np.ndarray | None]:
    parents = None
    if not chain:
        parents = np.stack([draw.integers(-1, t, BATCH) for t in range(1, NODES + 1)], axis=1).astype(np.int32)
    return dict(
        tokens=draw.integers(0, VOCAB, (BATCH, NODES)).astype(np.int32),
        parents=parents,
        counts=draw.integers(0, NODES + 1, BATCH).astype(np.int32) if draw.random() < 0.7 else None,
    )


def above(draft: dict, row: int, node: int) -> list[int]:
    """The node's ancestors from the root down, and itself."""
    if node == 0:
        return [0]
    parent = node - 1 if draft["parents"] is None else max(0, int(draft["parents"][row, node - 1]))
    return [*above(draft, row, parent), node]


def walked(draft: dict, choices: np.ndarray) -> list[list[int]]:
    """Each row's path: from the root to the first child, in order, that is meant and is what the target chose."""
    paths = []
    for row in range(BATCH):
        meant = NODES if draft["counts"] is None else draft["counts"][row]
        path = [0]
        while True:
            children = [
                t
                for t in range(1, meant + 1)
                if (t - 1 if draft["parents"] is None else draft["parents"][row, t - 1]) == path[-1]
                and draft["tokens"][row, t - 1] == choices[row, path[-1]]
            ]
            if not children:
                break
            path.append(children[0])
        paths.append(path)
    return paths


@cache
def equality(sampled: bool, penalised: bool, chain: bool, counted: bool):
    """The rule as a program; one for each kind of draft and request."""

    def run(draft, logits, emitted, seeds, latest, controls, seen):
        judge = Judge(emitted, seeds, latest, controls, seen, VOCAB)
        return by_equality(judge, draft, logits, DEPTH)

    return jax.jit(run)


KINDS = [(False, True), (True, False)]


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), chain=st.booleans())
def test_equality_follows_the_targets_own_draws(seed: int, kind: tuple[bool, bool], chain: bool) -> None:
    sampled, penalised = kind
    draw = np.random.default_rng(seed)
    draft = random_draft(draw, chain=chain)
    # Logits that repeat, so that branches are often followed and chosen tokens change with what was seen.
    logits = draw.normal(size=(BATCH, NODES + 1, VOCAB)).astype(np.float32)
    emitted = draw.integers(0, 9, BATCH).astype(np.int32)
    seeds = draw.integers(0, 2**32, BATCH, dtype=np.uint32)
    latest = draw.integers(0, VOCAB, BATCH).astype(np.int32)
    params = SamplingParams(temperature=0.8, top_k=3) if sampled else SamplingParams()
    if penalised:
        params = SamplingParams(temperature=params.temperature, repetition_penalty=1.8)
    controls = Controls.of([params] * BATCH)
    seen = draw.random((BATCH, VOCAB)) < 0.2 if penalised else None
    if seen is not None:
        seen[np.arange(BATCH), latest] = True

    want = np.zeros((BATCH, NODES + 1), np.int32)
    for row in range(BATCH):
        for node in range(NODES + 1):
            path = above(draft, row, node)
            scores = logits[row, node].copy()
            if seen is not None:
                known = seen[row].copy()
                known[[draft["tokens"][row, t - 1] for t in path[1:]]] = True
                scores = np.where(known, np.where(scores < 0, scores * 1.8, scores / 1.8), scores)
            if not sampled:
                want[row, node] = scores.argmax()
                continue
            at = jnp.asarray([emitted[row] + len(path) - 1])
            one = jax.tree.map(lambda x: x[:1], controls)
            drawn = drawn_alone(jnp.asarray(scores)[None], one, jnp.asarray(seeds[row : row + 1]), at)
            want[row, node] = int(drawn[0])

    program = equality(sampled, penalised, chain, draft["counts"] is not None)
    got = jax.device_get(program(Draft(**draft), logits, emitted, seeds, latest, controls, seen))
    assert np.array_equal(got.choices, want)
    for row, path in enumerate(walked(draft, want)):
        assert got.path[row, : got.counts[row]].tolist() == path
        assert got.tokens[row, : len(path)].tolist() == want[row, path].tolist()
        assert not got.path[row, len(path) :].any()


@jax.jit
def drawn_alone(scores, controls, seeds, at):
    return sample(scores, controls, row_keys(seeds, at), context=Context(at, at))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_ancestors_are_the_way_to_the_root(seed: int) -> None:
    draft = random_draft(np.random.default_rng(seed))
    mask = np.asarray(jax.jit(ancestors)(draft["parents"]))
    for row in range(BATCH):
        for node in range(NODES + 1):
            assert np.flatnonzero(mask[row, node]).tolist() == above(draft, row, node)


# Rejection. First the definition with its law in closed form, then the code at every branch of the definition.

LETTERS = 3
TREES = {
    "chain": (0, 1, 2),
    "siblings": (0, 0, 0),
    "two levels": (0, 0, 1, 1),
    "depth first": (0, 1, 0, 3),
}


def depths_of(parents: tuple[int, ...]) -> list[int]:
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return depths


class Game:
    """Targets p and drafters q after every word of at most as many letters as the tree is deep."""

    def __init__(self, parents: tuple[int, ...], draw: np.random.Generator):
        self.parents, self.depths = parents, depths_of(parents)
        self.words = [w for n in range(max(self.depths) + 1) for w in itertools.product(range(LETTERS), repeat=n)]

        def law() -> np.ndarray:
            x = draw.random(LETTERS) + 0.02
            kind = draw.integers(5)
            if kind == 0:
                x = np.eye(LETTERS)[draw.integers(LETTERS)]
            elif kind == 1:
                x[draw.integers(LETTERS)] = 0.0
            return (x / x.sum()).astype(np.float32)

        self.p = {word: law() for word in self.words}
        self.q = {word: self.p[word] if draw.random() < 0.2 else law() for word in self.words}

    def before(self, node: int, letters: tuple[int, ...]) -> tuple[int, ...]:
        """The word that ends with a node."""
        return () if node == 0 else (*self.before(self.parents[node - 1], letters), letters[node - 1])

    def judged(self, letters: tuple[int, ...], stands: tuple[bool, ...]):
        """The verdict if node t stands where it is judged and `stands[t - 1]`: `(the bound below which each node's
        uniform has to lie for it, None where none is judged; the word; p of what follows)`, in float64."""
        p, current, bounds = self.p[()].astype(np.float64), 0, []
        for t, parent in enumerate(self.parents, start=1):
            if parent != current:
                bounds.append(None)
                continue
            token, q = letters[t - 1], self.q[self.before(parent, letters)].astype(np.float64)
            bound = min(1.0, p[token] / q[token])
            bounds.append(bound)
            if stands[t - 1]:
                current, p = t, self.p[self.before(t, letters)].astype(np.float64)
            elif bound < 1:
                left = np.maximum(p - q, 0)
                p = left / left.sum()
        return bounds, self.before(current, letters), p


def branches(game: Game):
    """Everything that may happen: `(letters, stands, probability, bounds, word, p of what follows)`."""
    nodes = len(game.parents)
    for letters in itertools.product(range(LETTERS), repeat=nodes):
        drawn = np.prod(
            [game.q[game.before(parent, letters)][letters[t]] for t, parent in enumerate(game.parents)],
            dtype=np.float64,
        )
        if drawn == 0:
            continue
        done = set()
        for stands in itertools.product((True, False), repeat=nodes):
            bounds, word, p = game.judged(letters, stands)
            key = tuple(s for s, bound in zip(stands, bounds, strict=True) if bound is not None)
            weight = np.prod([b if s else 1 - b for b, s in zip(bounds, stands, strict=True) if b is not None])
            if weight * drawn > 0 and (key, word) not in done:
                done.add((key, word))
                yield letters, stands, drawn * weight, bounds, word, p


def law_of(game: Game, outcomes) -> np.ndarray:
    """Probabilities of all words one longer than the tree is deep, shorter ones continued by the target."""
    longest = max(game.depths) + 1
    law = np.zeros((LETTERS,) * longest)
    for chance, word, p in outcomes:
        for letter in range(LETTERS):
            reach = chance * p[letter]
            if reach > 0:
                put(law, game, (*word, letter), reach)
    return law


def put(law: np.ndarray, game: Game, word: tuple[int, ...], chance: float) -> None:
    if len(word) == law.ndim:
        law[word] += chance
        return
    for letter in range(LETTERS):
        put(law, game, (*word, letter), chance * float(game.p[word][letter]))


def plain_law(game: Game) -> np.ndarray:
    law = np.zeros((LETTERS,) * (max(game.depths) + 1))
    put(law, game, (), 1.0)
    return law


@cache
def rejection(parents: tuple[int, ...]):
    """`by_rejection` with given uniforms: `(accepted, the logits that the last token is drawn from)`."""

    def run(tokens, probs, logits, uniforms):
        batch = tokens.shape[0]
        last = []

        def keys(seeds, emitted, number):
            return uniforms[:, number // 2 - 2]

        def drawn(keys, logits):
            last.append(logits)
            return jnp.argmax(logits, axis=1).astype(jnp.int32)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accept, "pass_keys", keys)
            patch.setattr(accept, "categorical", drawn)
            patch.setattr(jax.random, "uniform", lambda key, shape, dtype: key)
            zeros = jnp.zeros((batch,), jnp.int32)
            warm = Controls(temperature=jnp.ones((batch,), jnp.float32))
            judge = Judge(zeros, zeros.astype(jnp.uint32), zeros, warm, None, LETTERS)
            tree = jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape)
            draft = Draft(tokens, parents=tree, probs=probs)
            found = by_rejection(judge, draft, logits, max(depths_of(parents)))
        return found, last[0]

    return jax.jit(run)


@pytest.mark.parametrize("name", TREES)
def test_rejection_has_the_targets_law(name: str) -> None:
    """Every draft, every verdict, weighed by the lengths of the intervals of the uniforms: nothing is sampled."""
    for seed in range(6):
        game = Game(TREES[name], np.random.default_rng([seed, len(name)]))
        found = list(branches(game))
        np.testing.assert_allclose(sum(chance for _, _, chance, *_ in found), 1, atol=1e-6)
        want = plain_law(game)
        np.testing.assert_allclose(law_of(game, [(c, w, p) for _, _, c, _, w, p in found]), want, atol=1e-6)


EDGE = 1e-5
"""How close to a bound uniforms are tried."""


@pytest.mark.parametrize("name", TREES)
def test_rejection_is_its_definition(name: str) -> None:
    """At both sides of every bound the code gives the definition's verdict, and draws from what it says."""
    parents = TREES[name]
    nodes, most = len(parents), (2 * LETTERS) ** len(parents)
    for seed in range(6):
        draw = np.random.default_rng([seed, len(name)])
        game = Game(parents, draw)
        found = [x for x in branches(game) if all(b is None or b < 1 - EDGE or b == 1 for b in x[3])]
        chance = sum(x[2] for x in found)
        assert chance > 0.999
        uniforms = draw.random((most, nodes)).astype(np.float32)
        tokens = np.zeros((most, nodes), np.int32)
        p = np.full((most, nodes + 1, LETTERS), 1 / LETTERS, np.float32)
        q = np.full((most, nodes, LETTERS), 1 / LETTERS, np.float32)
        for row, (letters, stands, _, bounds, _, _) in enumerate(found):
            tokens[row] = letters
            for t in range(nodes + 1):
                p[row, t] = game.p[game.before(t, letters)]
            for t, parent in enumerate(parents):
                q[row, t] = game.q[game.before(parent, letters)]
                if bounds[t] is not None:
                    uniforms[row, t] = max(0, bounds[t] - EDGE) if stands[t] else min(1, bounds[t] + EDGE)
        with np.errstate(divide="ignore"):
            logits = np.log(p)
        got, last = jax.device_get(rejection(parents)(tokens, q, logits, uniforms))
        follows = np.exp(last - last.max(axis=1, keepdims=True))
        follows /= follows.sum(axis=1, keepdims=True)
        outcomes = []
        for row, (letters, _, weight, _, word, want) in enumerate(found):
            count = got.counts[row]
            assert tuple(letters[t - 1] for t in got.path[row, 1:count]) == word
            assert tuple(got.tokens[row, : count - 1]) == word
            assert got.tokens[row, count - 1] == follows[row].argmax()
            np.testing.assert_allclose(follows[row], want, atol=2e-3)
            outcomes.append((weight / chance, word, follows[row]))
        np.testing.assert_allclose(law_of(game, outcomes), plain_law(game), atol=1e-4 + 1 - chance)


def test_residuals() -> None:
    p = np.asarray([[0.5, 0.3, 0.2, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0.25, 0.25, 0.25, 0.25]], np.float32)
    q = np.asarray([[0.2, 0.5, 0.1, 0.2], [0.5, 0.5, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    left = [[0.75, 0, 0.25, 0], p[1], p[2], [0, 1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(residual(jnp.asarray(p), jnp.asarray(q)), left, atol=1e-6)


def test_cold_rows_among_warm_ones() -> None:
    """At temperature 0 rejection follows the likeliest tokens, as equality does; its neighbours sample."""
    draw = np.random.default_rng(0)
    rows = 64
    logits = draw.normal(size=(rows, NODES + 1, VOCAB)).astype(np.float32)
    likeliest = logits.argmax(axis=2)
    parents = np.broadcast_to(np.asarray([0, 0, 1, 2, 4], np.int32), (rows, NODES))
    guess = np.take_along_axis(likeliest, parents, 1)
    tokens = np.where(draw.random((rows, NODES)) < 0.4, guess, draw.integers(0, VOCAB, (rows, NODES)))
    cold = np.arange(rows) % 2 == 0
    probs = np.where(cold[:, None, None], np.eye(VOCAB)[tokens], 1 / VOCAB).astype(np.float32)
    controls = Controls(temperature=jnp.asarray(np.where(cold, 0.0, 1.0), jnp.float32))
    zeros = jnp.zeros((rows,), jnp.int32)
    judge = Judge(zeros, jnp.arange(rows, dtype=jnp.uint32), zeros, controls, None, VOCAB)
    given = Draft(jnp.asarray(tokens, jnp.int32), parents=jnp.asarray(parents))
    want = jax.device_get(jax.jit(lambda x: by_equality(judge, given, x, 3))(logits))
    drawn = Draft(given.tokens, parents=given.parents, probs=jnp.asarray(probs))
    got = jax.device_get(jax.jit(lambda x: by_rejection(judge, drawn, x, 3))(logits))
    assert np.array_equal(got.counts[cold], want.counts[cold])
    assert np.unique(got.counts[cold]).tolist() == [1, 2, 3, 4]
    for row in np.flatnonzero(cold):
        count = got.counts[row]
        assert got.path[row, :count].tolist() == want.path[row, :count].tolist()
        assert got.tokens[row, :count].tolist() == likeliest[row, got.path[row, :count]].tolist()
    last = got.tokens[~cold, got.counts[~cold] - 1]
    assert (last != likeliest[~cold, got.path[~cold, got.counts[~cold] - 1]]).any()


def test_unmeant_nodes_never_stand() -> None:
    """Past `counts`, or with a parent of -1; their children neither."""
    tokens, one = jnp.asarray([[1, 1, 1]], jnp.int32), jnp.ones((1,), jnp.int32)
    logits = jnp.zeros((1, 4, VOCAB)).at[:, :, 1].set(9.0)
    judge = Judge(one, one.astype(jnp.uint32), one, Controls(temperature=jnp.ones((1,), jnp.float32)), None, VOCAB)
    probs = jnp.zeros((1, 3, VOCAB)).at[:, :, 1].set(1.0)
    for rule, told in ((by_equality, None), (by_rejection, probs)):
        for counts in range(4):
            draft = Draft(tokens, jnp.asarray([counts], jnp.int32), probs=told)
            assert int(rule(judge, draft, logits, 3).counts[0]) == counts + 1
        draft = Draft(tokens, None, jnp.asarray([[-1, 1, 0]], jnp.int32), probs=told)
        found = rule(judge, draft, logits, 3)
        assert found.path[0, : int(found.counts[0])].tolist() == [0, 3]
