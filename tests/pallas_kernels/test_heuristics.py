"""The heuristics for block sizes against a search: a few shapes in CI; named ones and 20 random ones in hours."""

import runpy
from pathlib import Path

import pytest
from tpu_compiler import compiles

pytestmark = compiles
COMMAND = Path(__file__).parents[2] / "benchmarks" / "heuristics.py"


def worst(*words: str) -> int:
    """0 where every shape's heuristic is within 15 % of the best that the search finds."""
    return runpy.run_path(str(COMMAND))["main"]([*words])


@pytest.mark.parametrize(("op", "seed"), [("quantized_matmul", 3), ("flash_decode", 5)])
def test_a_random_shape(op: str, seed: int) -> None:
    assert (
        worst("--chip", "v6e", "--op", op, "--random", "1", "--named", "0", "--budget", "4", "--seed", str(seed))
        == 0
    )


def test_random_shapes_differ_from_named_ones_and_from_each_other() -> None:
    script = runpy.run_path(str(COMMAND))
    for op in script["searched"]():
        drawn = [repr(script["random_case"](op, seed)) for seed in range(4)]
        assert len(set(drawn)) == 4
        assert drawn[0] == repr(script["random_case"](op, 0))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_named_and_random_shapes(chip: str) -> None:
    assert worst("--chip", chip, "--random", "20", "--named", "3") == 0
