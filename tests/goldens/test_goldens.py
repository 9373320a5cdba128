"""The golden files are whole and agree with themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("*/golden.safetensors"))


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    with safe_open(folder / "golden.safetensors", "np") as file:
        about = json.loads(file.metadata()["about"])
    return load_file(folder / "golden.safetensors"), about


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_arrays_agree(folder: Path) -> None:
    arrays, about = read(folder)
    config = json.loads((folder / "config.json").read_text())
    tokens, lengths, greedy = arrays["tokens"], arrays["prompt_lengths"], arrays["greedy"]
    assert about["case"] == folder.name
    assert tokens.dtype == lengths.dtype == greedy.dtype == np.int32
    assert greedy.shape == (2, 24)
    assert arrays["logits"].shape == (*tokens.shape, config["vocab_size"])
    assert arrays["logits"].dtype == np.float32
    assert np.isfinite(arrays["logits"]).all()
    assert all(a.min() >= 0 and a.max() < config["vocab_size"] for a in (tokens, greedy))
    if "dynamic" not in json.dumps(config):  # there the length of the whole sequence matters
        at_prompt_end = arrays["logits"][np.arange(2), lengths - 1]
        np.testing.assert_array_equal(at_prompt_end.argmax(-1), greedy[:, 0])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_windows_are_shorter_than_the_sequence(folder: Path) -> None:
    window = json.loads((folder / "config.json").read_text()).get("sliding_window")
    assert window is None or window < read(folder)[0]["prompt_lengths"].min()


def test_all_cases_are_there_and_small() -> None:
    assert len(FOLDERS) >= 40
    size = sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir())
    assert size < 4.2e6
