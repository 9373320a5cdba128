"""The target drafting for itself: the same tokens, and which layers to leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation.speculative.runs import Task, rows_of
from tiny_models import model, spec, whole

from jaxinf.generation import SamplingParams
from jaxinf.generation.speculative import SelfSpeculative, find_skips
from jaxinf.generation.speculative.self_speculative import expected_speedup, skippable
from pallas_kernels.errors import InputError, UnsupportedError

PROMPTS = [[1, 2, 3], list(range(1, 31)), [5] * 12, [9]]
LIMITS = [12, 9, 1, 24]
GREEDY, WARM = SamplingParams(), SamplingParams(temperature=1.2, top_k=20)


@pytest.mark.parametrize("layout", ["list", "stacked"])
def test_greedy_rows_are_those_of_plain_decoding(layout: str) -> None:
    net = model(spec(window=6, repeats=2), layout=layout)
    drafter = SelfSpeculative((2, 3), tokens=3, confidence=0.05 if layout == "list" else 0.0)
    drafter.check(net)
    task = Task(net, PROMPTS, LIMITS, [GREEDY, WARM, WARM, GREEDY] if layout == "stacked" else GREEDY, eos=[7])
    one, after, written = task.drafted(drafter)
    got, want = rows_of(one, written), rows_of(task.plain)
    same = [0, 3] if layout == "stacked" else range(4)
    assert [got[row] for row in same] == [want[row] for row in same]
    assert after.tally.accepted.sum() > 0
    assert after.cache.lengths.tolist() == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, got, strict=True)]


@pytest.mark.parametrize("layout", ["list", "stacked"])
def test_left_out_layers_are_as_good_as_absent(layout: str) -> None:
    net = model(spec(repeats=3), layout=layout)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    short = model(spec(repeats=2), layout=layout)
    for name in ("embed", "final_norm", "head"):
        setattr(short, name, getattr(net, name))
    blocks = list(net.segments[0].blocks)
    if layout == "list":
        short.segments[0].blocks = nnx.List([*blocks[:2], *blocks[4:]])
    else:
        kept = np.asarray([0, 2])
        cut = [nnx.merge(graph, jax.tree.map(lambda x: x[kept], s)) for graph, s in map(nnx.split, blocks)]
        short.segments[0].blocks = nnx.List(cut)
    hidden, _, _ = net.hidden(tokens, skip=(2, 3))
    np.testing.assert_allclose(net.logits(hidden), whole(short, tokens), atol=2e-4)


def test_the_search_finds_layers_that_do_nothing() -> None:
    net = model(spec(layers=1, repeats=5))
    for layer in (1, 3):
        block = net.segments[0].blocks[layer]
        for product in (block.attention.out, block.ffn.down):
            product.kernel[...] = jnp.zeros_like(product.kernel[...])
    seen = []
    text = np.random.default_rng(1).integers(0, 64, (4, 16))
    found = find_skips(net, text, draft_tokens=4, progress=lambda done, of: seen.append((done, of)))
    assert {1, 3} <= {*found.layers}
    assert found.speedup == pytest.approx(expected_speedup(found.agreement, found.kept, 4)[0])
    assert found.speedup >= expected_speedup(1.0, 3 / 5, 4)[0] > 1.4
    assert seen[-1] == (5 + 4 + 3 + 2, 5 + 4 + 3 + 2)
    SelfSpeculative(found.layers).check(net)
    alone = find_skips(net, text, draft_tokens=4, most=2)
    assert (alone.layers, alone.agreement, alone.kept) == ((1, 3), 1.0, pytest.approx(3 / 5))


def test_the_expected_speedup_is_that_of_its_formula() -> None:
    a, c = 0.8, 0.25
    assert expected_speedup(a, c, 6) == max(((1 - a ** (g + 1)) / (1 - a) / (g * c + 1), g) for g in range(1, 7))
    assert expected_speedup(0.0, 0.5, 4) == (1 / 1.5, 1)


def test_what_can_be_left_out_follows_the_layout() -> None:
    assert skippable(model(spec(repeats=2))) == [(0,), (1,), (2,), (3,)]
    stacked = model(spec(repeats=3), layout="stacked")
    assert skippable(stacked) == [(0, 1), (2, 3), (4, 5)]
    assert SelfSpeculative.of(stacked).skips == (2, 3)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(skips=()), InputError, "find_skips"),
        (dict(skips=(0, 1, 2, 3, 4, 5)), InputError, "keep some"),
        (dict(skips=(6,)), InputError, "layers of 0 to 5"),
        (dict(skips=(2, 2)), InputError, "different layers"),
        (dict(skips=(1,)), UnsupportedError, r"parts the layers \(0, 1\)"),
        (dict(skips=(0, 1), tokens=16), InputError, "draft_tokens=16"),
        (dict(skips=(0, 1), confidence=1.0), InputError, r"confidence=1\.0"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SelfSpeculative(**options).check(model(spec(repeats=3), layout="stacked"))


def test_the_search_says_what_it_cannot_search() -> None:
    with pytest.raises(InputError, match=r"\[B, T\]"):
        find_skips(model(spec()), [])
    with pytest.raises(InputError, match="one layer"):
        find_skips(model(spec(layers=1)), [[1, 2]])
