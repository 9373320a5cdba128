"""A draft model that writes trees: the same tokens, and a cache of its own that follows the accepted branch."""

import pytest
from generation.speculative.runs import Task, rows_of
from tiny_models import model, spec

from jaxinf.generation import SamplingParams
from jaxinf.generation.speculative import DraftTree
from pallas_kernels.errors import InputError

PROMPTS = [[1, 2, 3], list(range(1, 31)), [5] * 12, [9]]
LIMITS = [24, 9, 1, 24]


def test_a_tree_of_the_target_itself_is_accepted_whole() -> None:
    """So what it has read by way of accepted branches is what it would have read as text."""
    net = model(spec(window=6))
    cold, warm = SamplingParams(), SamplingParams(temperature=1.2, top_k=9, repetition_penalty=1.5)
    task = Task(net, PROMPTS, LIMITS, [cold, warm, cold, warm])
    one, after, written = task.drafted(DraftTree(net, (2, 1)))
    got, want = rows_of(one, written), rows_of(task.plain)
    assert (got[0], got[2]) == (want[0], want[2])
    assert [len(row) for row in got] == LIMITS
    assert after.tally.accepted.tolist() == after.tally.offered.tolist()
    assert after.tally.offered.sum(1).tolist() == [16, 6, 0, 16]


def test_the_shape_of_a_tree() -> None:
    drafter = DraftTree(model(spec()), (3, 2, 1))
    assert drafter.parents == (0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9)
    assert (drafter.nodes, drafter.depth, drafter.chain) == (15, 3, False)
    assert DraftTree(model(spec()), (1, 1)).chain
    drafter.check(model(spec()))


@pytest.mark.parametrize(
    ("branches", "vocab", "says"),
    [
        ((), 64, r"branches=\(\)"),
        ((3, 2, 2), 64, "tree of 21 nodes"),
        ((3, 0), 64, "a level of branches=0"),
        ((8,), 6, "from 1 to 6"),
        ((2, 1), 32, "vocabulary of 64"),
    ],
)
def test_bad_input(branches: tuple[int, ...], vocab: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        DraftTree(model(spec()), branches).check(model(spec(vocab=vocab)))
