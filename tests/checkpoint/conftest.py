"""Golden checkpoints, in either form of their configs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def golden(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a golden checkpoint that may be changed: `golden(case)`, `golden(case, "config_v4.json")`."""

    def copy(case: str, form: str = "config.json") -> Path:
        folder = tmp_path / case
        shutil.copytree(GOLDENS / case, folder, ignore=shutil.ignore_patterns("config*.json", "golden*"))
        shutil.copy(GOLDENS / case / form, folder / "config.json")
        return folder

    return copy
