"""Drafts from a datastore: the same tokens, the right places found, the most frequent continuations drafted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.runs import Task, rows_of
from tiny_models import model, spec

from jaxinf.generation import SamplingParams
from jaxinf.generation.speculative import Datastore, Retrieval
from jaxinf.generation.speculative.retrieval import FURTHER, LONGER, trie
from pallas_kernels.errors import CheckpointError, InputError

PROMPTS = [[1, 2, 3], list(range(1, 31)), [5] * 12, [9]]
LIMITS = [24, 9, 1, 24]


def texts(seed: int = 0, vocab: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n) for n in (120, 1, 33, 60)]


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_rows_are_those_of_plain_decoding(temperature: float | None) -> None:
    net = model(spec(window=6))
    params = [SamplingParams(), *[SamplingParams(temperature=temperature or 0.0)] * 3]
    task = Task(net, PROMPTS, LIMITS, params, eos=[7])
    plain = rows_of(task.plain)
    store = Datastore.build([[*PROMPTS[0], *plain[0]], [*PROMPTS[3], *plain[3][:9], 1, 2], *texts(vocab=64)], 64)
    drafter = Retrieval.of(store, tokens=6, longest=3, longest_draft=3)
    drafter.check(net)
    one, after, written = task.drafted(drafter)
    assert rows_of(one, written) == plain
    assert after.tally.accepted[0].min() > 0  # the text tells all of row 0


def occurrences(store: Datastore, row: list[int], n: int, depth: int) -> list[tuple[int, ...]]:
    """By going through the whole text: what follows the last n tokens."""
    text = [*store.tokens.tolist(), *[-1] * (n + depth)]
    found = [text[i + n : i + n + depth] for i in range(len(store.tokens)) if text[i : i + n] == row[-n:]]
    return [tuple(x[: x.index(-1)] if -1 in x else x) for x in found]


def test_all_occurrences_are_found_and_the_heaviest_continuations_drafted() -> None:
    store, depth, longest = Datastore.build(texts(vocab=6), 6), 3, 4
    drafter = Retrieval.of(store, tokens=15, longest=longest, longest_draft=depth, samples=64)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 6, n).tolist() for n in (1, 2, 3, 5, 9, 9)]
    rows += [store.tokens[20:24].tolist(), store.tokens[-5:-1].tolist(), [2, 7], [7, 2]]
    last = np.zeros((len(rows), longest), np.int32)
    for i, row in enumerate(rows):
        last[i, longest - min(longest, len(row)) :] = row[-longest:]
    known = np.asarray([min(longest, len(row)) for row in rows], np.int32)

    @jax.jit
    def drafted(drafter: Retrieval, last: jax.Array, known: jax.Array):
        return drafter._ranges(last, known), trie(*drafter._follows(last, known), drafter.tokens)

    (_, count, lengths), (tokens, parents) = drafted(drafter, last, known)
    assert lengths.tolist() == [4, 3, 2, 1]
    for i, row in enumerate(rows):
        weights: dict[tuple[int, ...], float] = {}
        for n, places in zip(lengths.tolist(), count[i].tolist(), strict=True):
            found = occurrences(store, row, n, depth) if n <= len(row) else []
            assert places == len(found) <= 64
            for x in found:
                for k in range(1, len(x) + 1):
                    weight = LONGER**n / len(found) * FURTHER ** (k - 1)
                    weights[x[:k]] = weights.get(x[:k], 0.0) + weight
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens[i].tolist(), parents[i].tolist(), strict=True):
            assert parent < len(paths)
            paths.append((*paths[parent], token) if parent >= 0 else (-1,))
        got = [path for path in paths[1:] if path != (-1,)]
        assert len({*got}) == len(got) == min(15, len(weights))
        want = sorted(weights.values(), reverse=True)[:15]
        np.testing.assert_allclose([weights[path] for path in got], want, rtol=1e-4)
    assert count[-2].max() == 0  # nothing known ends in 7


def test_of_many_occurrences_shares_are_kept() -> None:
    store = Datastore.build([[1, 2] * 30 + [1, 3] * 10], 4)
    drafter = Retrieval.of(store, tokens=2, longest=1, longest_draft=1, samples=8)
    follows, weights = drafter._follows(jnp.asarray([[1]]), jnp.asarray([1]))
    assert np.bincount(np.asarray(follows).ravel()).tolist() == [0, 0, 6, 2]
    np.testing.assert_allclose(weights, LONGER / 8)


def test_suffixes_are_sorted_by_so_many_tokens() -> None:
    for order in (1, 2, 3, 5, 32):
        store = Datastore.build(texts(2, vocab=3), 3, order=order)
        text = [*store.tokens.tolist(), *[-1] * order]
        assert store.suffixes.tolist() == sorted(range(len(store.tokens)), key=lambda i: (text[i : i + order], i))


def test_a_file_keeps_a_store(tmp_path) -> None:
    store = Datastore.build(texts(), 4, tokenizer="abc", order=16)
    path = store.save(tmp_path / "some" / "store.npz")
    assert [p.name for p in path.parent.iterdir()] == ["store.npz"]
    again = Datastore.load(path)
    assert (again.vocab, again.tokenizer, again.order) == (4, "abc", 16)
    assert np.array_equal(again.tokens, store.tokens)
    assert np.array_equal(again.suffixes, store.suffixes)
    with pytest.raises(InputError, match="is there already"):
        store.save(path)
    assert Retrieval.load(path, tokens=3).order == 16


def test_damaged_files_are_refused(tmp_path) -> None:
    store = Datastore.build(texts(), 4)
    path, whole = tmp_path / "store.npz", dict(tokens=store.tokens, suffixes=store.suffixes)
    about = b'{"jaxinf_datastore": 1, "vocab": 4, "tokenizer": null, "order": 32}'

    def refused(says: str, told: bytes = about, **changed) -> None:
        np.savez(path, about=np.frombuffer(told, np.uint8), **{**whole, **changed})
        with pytest.raises(CheckpointError, match=says):
            Datastore.load(path)

    np.savez(path, about=np.frombuffer(about, np.uint8), **whole)
    Datastore.load(path)
    refused("version 2", about.replace(b": 1", b": 2", 1))
    refused("vocab='a'", about.replace(b": 4", b': "a"'))
    refused("int32", tokens=store.tokens.astype(np.int64))
    refused("213 suffixes", suffixes=store.suffixes[:-5])
    refused("vocabulary of 4", tokens=store.tokens + 1)
    refused("every place once", suffixes=np.zeros_like(store.suffixes))
    refused("not sorted", suffixes=store.suffixes[::-1].copy())
    refused("cannot be read", suffixes=np.asarray([{}], object))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Datastore.load(path)
    np.savez(path, tokens=store.tokens)
    with pytest.raises(CheckpointError, match="has no about, suffixes"):
        Datastore.load(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(tokens=16), "draft_tokens=16"),
        (dict(longest=30), r"at most order=32"),
        (dict(longest=2, shortest=3), "shortest=3"),
        (dict(samples=0), "samples=0"),
        (dict(), "vocabulary of 4 tokens"),
    ],
)
def test_bad_input(options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Retrieval.of(Datastore.build(texts(), 4), **options).check(model(spec()))


def test_bad_texts() -> None:
    with pytest.raises(InputError, match="ids 0 to 9"):
        Datastore.build([[0, 9]], 9)
    with pytest.raises(InputError, match="one token"):
        Datastore.build([[]], 9)
    with pytest.raises(InputError, match=r"shape \(1, 2\)"):
        Datastore.build([[[0, 1]]], 9)  # type: ignore[list-item]
