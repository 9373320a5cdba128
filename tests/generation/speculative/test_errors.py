"""What is refused, each in a sentence that says what to do; nothing is compiled for it."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
from generation.speculative.drafters import table_tree
from generation.speculative.runs import Task, hosted, rows_of
from tiny_models import model, spec

from jaxinf.generation import Runner, SamplingParams
from jaxinf.generation.speculative import DraftModel, PromptLookup, Speculator
from jaxinf.layers import AttentionSpec, DynamicNTKRopeSpec, ExpertChoice, FFNSpec, LayerSpec, MoESpec, RopeSpec
from jaxinf.models import ModelSpec, Segment
from pallas_kernels.errors import InputError, UnsupportedError


@cache
def runner(window: int | None = None) -> Runner:
    return Runner(model(spec(window=window, layers=2 if window else 1)))


def begin(speculator: Speculator, rows: int = 1, *, tokens: int = 32, max_append: int | None = None, **options):
    made = options.pop("made", {})
    append = speculator.max_append if max_append is None else max_append
    cache = speculator.runner.new_cache(
        options.pop("cache_rows", rows), tokens, limit=tokens, max_append=append, **made
    )
    given = dict(limits=[9] * rows, params=[SamplingParams()] * rows, seeds=[0] * rows) | options
    return speculator.begin([[1, 2, 3]] * rows, cache, **given)


def test_another_vocabulary() -> None:
    other = model(spec(vocab=65, layers=1))
    says = (
        "the draft model has a vocabulary of 65 tokens, but the target's has 64: take one with the same tokenizer"
    )
    with pytest.raises(InputError, match=says):
        Speculator(runner(), DraftModel(other))


@pytest.mark.parametrize("tokens", [0, -1, 16, True, 2.0])
def test_lengths_of_drafts(tokens) -> None:
    for drafter in (DraftModel(runner().model, tokens=tokens), PromptLookup(tokens=tokens)):
        with pytest.raises(InputError, match=rf"drafted tokens={tokens!r} must be a whole number from 1 to 15"):
            Speculator(runner(), drafter)


def test_longest_drafts_are_taken() -> None:
    assert Speculator(runner(), PromptLookup(tokens=15)).max_append == 16


def test_ngrams_that_are_not_there() -> None:
    with pytest.raises(InputError, match="shortest=5 must be at most longest=4"):
        Speculator(runner(), PromptLookup(shortest=5))
    with pytest.raises(InputError, match="longest=65 must be a whole number from 1 to 64"):
        Speculator(runner(), PromptLookup(longest=65))


@pytest.mark.parametrize("parents", [tuple(range(16)), (0,) * 16])
def test_trees_beyond_the_mask(parents: tuple[int, ...]) -> None:
    """Sixteen drafted nodes, be it in depth or beside each other: with the latest token more than a pass sees."""
    with pytest.raises(InputError, match="the number of drafted tokens=16 must be a whole number from 1 to 15"):
        Speculator(runner(), table_tree(runner().model, 0, parents))


def test_caches_with_something_in_them() -> None:
    """A conversation goes on without a drafter."""
    with pytest.raises(InputError, match="a drafter reads prompts from their start: give an empty cache"):
        begin(Speculator(runner(), PromptLookup()), cached=[[1, 2]])


def test_caches_that_are_too_small() -> None:
    chain, tree = PromptLookup(tokens=5), table_tree(runner().model, 0)
    with pytest.raises(InputError, match=r"holds 10 tokens a row, but .* take 11: make it for 11"):
        begin(Speculator(runner(), chain), tokens=10)
    with pytest.raises(InputError, match="and 7 tokens of trees take 18: make it for 18"):
        begin(Speculator(runner(), tree), tokens=17)
    with pytest.raises(InputError, match="the cache has 1 rows, but there are 2 answers"):
        begin(Speculator(runner(), chain), limits=[9, 9], params=[SamplingParams()] * 2, seeds=[0, 0], samples=2)


@pytest.mark.parametrize("tree", [False, True])
def test_windows_that_cannot_go_back(tree: bool) -> None:
    drafter = table_tree(runner(4).model, 0) if tree else PromptLookup(tokens=7)
    with pytest.raises(
        InputError, match=r"of the cache 2 tokens can be taken back, but a draft has 7: .*max_append=8"
    ):
        begin(Speculator(runner(4), drafter), tokens=64, max_append=3)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (dict(window=12, sinks=2), "caches with attention sinks take chains of drafted tokens, not trees"),
        (dict(kind="int4"), "an int4 cache takes chains of drafted tokens, not trees"),
    ],
)
def test_caches_that_take_chains_alone(made: dict, says: str) -> None:
    net = runner().model
    cache = net.init_cache(1, 64, max_append=4, **made)
    mask = jnp.tri(3, dtype=bool)[None]
    with pytest.raises(UnsupportedError, match=says):
        jax.eval_shape(lambda: net.hidden(jnp.zeros((1, 3), jnp.int32), cache, tree=mask))
    path = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UnsupportedError, match=says):
        jax.eval_shape(lambda: cache.commit(path, jnp.ones((1,), jnp.int32)))


def test_a_tree_wider_than_a_window_allows() -> None:
    """Of a cache made by hand."""
    net = runner(4).model
    small = net.init_cache(1, 64, max_append=3)
    mask = jnp.tri(5, dtype=bool)[None]
    says = "a tree of 5 tokens needs a rolling cache made with max_append=5, but this one has max_append=3"
    with pytest.raises(UnsupportedError, match=says):
        jax.eval_shape(lambda: net.hidden(jnp.zeros((1, 5), jnp.int32), small, tree=mask))


def test_ropes_that_follow_the_length() -> None:
    rope = DynamicNTKRopeSpec(8, factor=2.0, original_max=32)
    net = model(spec(layers=1, rope=rope))
    with pytest.raises(UnsupportedError, match=r"rope depend on the length of a row.*: decode without a drafter"):
        Speculator(Runner(net), PromptLookup())


@cache
def chosen() -> Speculator:
    ffn = MoESpec(4, 8, ExpertChoice(among="step"), shared=FFNSpec(8))
    layer = LayerSpec(AttentionSpec(4, 2, 8, rope=RopeSpec(8)), ffn)
    return Speculator(Runner(model(ModelSpec(64, 32, (Segment((layer,), 1),), 512))), PromptLookup())


def test_experts_that_choose_among_rows() -> None:
    with pytest.raises(UnsupportedError, match=r"choose among the rows of a step, and 2 rows .*: give one row"):
        begin(chosen(), 2)


@pytest.mark.slow
def test_experts_that_choose_for_one_row() -> None:
    net = chosen().runner.model
    rows, _ = hosted(chosen().runner, PromptLookup(), [[1, 2, 1, 2, 1]], [20], steps=64)
    assert rows == rows_of(Task(net, [[1, 2, 1, 2, 1]], [20]).plain)


def test_a_draft_model_is_of_its_own_kind() -> None:
    """Other layers, other widths, the same tokens: nothing else has to agree."""
    other = model(spec(window=3, layers=1))
    assert Speculator(runner(), DraftModel(other)).spare == 0
