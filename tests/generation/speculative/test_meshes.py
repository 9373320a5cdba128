"""On a mesh of emulated devices drafting writes what one device writes plainly, or it is refused."""

from functools import cache

import pytest
from generation.speculative.drafters import CHAIN, DRAFTERS, eagle_head, medusa, nearly, table_tree
from generation.speculative.runs import Task, hosted, rows_of
from meshes import mesh
from tiny_models import model

from jaxinf.generation import Runner, SamplingParams
from jaxinf.generation.speculative import (
    Costs,
    Drafter,
    DraftModel,
    Eagle,
    PromptLookup,
    SelfSpeculative,
    Speculator,
)
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, Segment
from jaxinf.models.placing import place_model
from pallas_kernels.errors import UnsupportedError

VOCAB = 13  # padded wherever it is divided
PROMPTS = [[1, 2, 3], list(range(1, 13)), [5] * 12]  # a row less than two chips would have
LIMITS = [18, 9, 24]


@cache
def target(mixture: bool = False) -> CausalLM:
    ffn = MoESpec(4, 8, TokenChoice(top_k=2), shared=FFNSpec(16)) if mixture else FFNSpec(32)

    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(AttentionSpec(4, 2, 8, rope=RopeSpec(8), window=window), ffn)

    period = (layer(None),) if mixture else (layer(6), layer(None))
    return model(ModelSpec(VOCAB, 32, (Segment(period, 2),), 512), layout="stacked", gain=1.3)


WARM = [
    SamplingParams(temperature=0.9, top_k=7),
    SamplingParams(temperature=1.2, top_p=0.9),
    SamplingParams(repetition_penalty=1.3),
]


@cache
def plain(mixture: bool = False, warm: bool = False) -> list[list[int]]:
    return rows_of(Task(target(mixture), PROMPTS, LIMITS, WARM if warm else None).plain)


def spread(drafter: Drafter, sizes: dict[str, int], *, mixture: bool = False, warm: bool = False, costs=None):
    """Tokens on a mesh."""
    where = mesh(**sizes)
    drafter = drafter.on(where)
    runner = Runner(place_model(target(mixture), where))
    rows, batch = hosted(
        runner,
        drafter,
        PROMPTS,
        LIMITS,
        steps=64,
        costs=costs,
        params=WARM if warm else [SamplingParams()] * 3,
        seeds=[0, 1, 2],
    )
    assert batch.tally.accepted.sum() > 0
    return rows


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=2, tensor=2),
        pytest.param(dict(sequence=2), marks=SLOW),
        pytest.param(dict(pipeline=2), marks=SLOW),
        pytest.param(dict(data=2, sequence=2, tensor=2), marks=SLOW),
        pytest.param(dict(pipeline=2, tensor=2, data=2), marks=SLOW),
        pytest.param(dict(tensor=4, sequence=2), marks=SLOW),  # chips that share key heads
    ],
    ids=str,
)
def test_chains(sizes: dict[str, int]) -> None:
    assert spread(PromptLookup(tokens=3), sizes) == plain()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(sequence=2), dict(pipeline=2)], ids=str)
def test_draft_models(sizes: dict[str, int]) -> None:
    """They lie on the mesh of their target, and do their steps there, costs and all."""
    drafter = DraftModel(nearly(target(), 1), tokens=3)
    assert spread(drafter, sizes, costs=Costs(1.3, 0.0, 0.1)) == plain()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(sequence=2, tensor=2)], ids=str)
def test_sampled_rows(sizes: dict[str, int]) -> None:
    assert spread(table_tree(target(), 0, CHAIN), sizes, warm=True) == plain(warm=True)


@pytest.mark.slow
def test_rejection_is_that_of_one_device() -> None:
    """Not plain decoding's tokens, but on any chips the same."""
    drafter = DraftModel(nearly(target(), 1), tokens=3)
    found = [spread(drafter, sizes, warm=True) for sizes in (dict(), dict(data=2), dict(tensor=2))]
    assert found[0] == found[1] == found[2]
    assert found[0] != plain(warm=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(expert=2), dict(expert=2, data=2, tensor=2)], ids=str)
def test_experts(sizes: dict[str, int]) -> None:
    assert spread(PromptLookup(tokens=3), sizes, mixture=True) == plain(mixture=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=2), dict(data=2, tensor=2), dict(expert=2, data=2)], ids=str)
def test_trees(sizes: dict[str, int]) -> None:
    mixture = "expert" in sizes
    assert spread(table_tree(target(mixture), 0), sizes, mixture=mixture) == plain(mixture)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=2), dict(tensor=2)], ids=str)
@pytest.mark.parametrize("name", ["medusa", "lookahead", "retrieval"])
def test_other_trees(name: str, sizes: dict[str, int]) -> None:
    assert spread(DRAFTERS[name](target(), 0), sizes) == plain()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(sequence=2)], ids=str)
def test_layers_left_out(sizes: dict[str, int]) -> None:
    """Of stacked layers, a whole period."""
    assert spread(SelfSpeculative((2, 3), tokens=3), sizes) == plain()


@pytest.mark.parametrize("axis", ["sequence", "pipeline"])
def test_trees_are_refused_where_keys_cannot_move(axis: str) -> None:
    runner = Runner(place_model(target(), mesh(**{axis: 2})))
    says = f"trees of drafted tokens move keys within the cache, which {axis}=2 spreads over chips: take a drafter"
    with pytest.raises(UnsupportedError, match=says):
        Speculator(runner, table_tree(target(), 0))


def test_what_reads_prompts_is_refused_where_they_are_split() -> None:
    runner = Runner(place_model(target(), mesh(sequence=2)))
    says = "this drafter reads the hidden states of prompts, which sequence=2 spreads over chips"
    with pytest.raises(UnsupportedError, match=says):
        Speculator(runner, Eagle(eagle_head(target(), 0)))
    with pytest.raises(UnsupportedError, match="sequence=2 spreads over chips"):
        Speculator(runner, medusa(target(), 0))
