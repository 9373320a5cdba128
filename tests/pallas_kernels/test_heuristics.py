"""The heuristics for block sizes against a search, at named shapes and 20 random ones: hours."""

import runpy
from pathlib import Path

import pytest
from tpu_compiler import compiles

pytestmark = [*compiles, pytest.mark.slow]
COMMAND = Path(__file__).parents[2] / "benchmarks" / "heuristics.py"


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_within_a_seventh_of_the_best(chip: str) -> None:
    main = runpy.run_path(str(COMMAND))["main"]
    assert main(["--chip", chip, "--random", "20", "--named", "3"]) == 0
