"""`jaxinf compile`."""

import json
from pathlib import Path

import pytest


def test_programs_are_saved_and_then_used(run, run_json, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "programs"
    sizes = ["--prompt", "4,8", "--new", "8"]
    got = run_json("compile", checkpoint, target, *sizes)
    assert [p["name"] for p in got["programs"]] == ["append", "first", "decode"], "4 and 8 share a bucket"
    assert got["bytes"] == sum((target / p["file"]).stat().st_size for p in got["programs"])

    prompt = ["generate", "ab", "--model", checkpoint, "--max-new-tokens", "8"]
    plain, used = run_json(*prompt), run_json(*prompt, "--programs", target)
    assert used["completions"][0]["tokens"] == plain["completions"][0]["tokens"]
    # A warning would be an error here.

    manifest = json.loads((target / "programs.json").read_text())
    manifest["made"]["jax"] = "0.1"
    (target / "programs.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"jax was '0\.1', is "):
        assert run(*prompt, "--programs", target)[0] == 0


def test_bad_input_is_refused_before_anything_is_compiled(run, refused, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "exists already" in refused("compile", checkpoint, tmp_path / "mine")
    assert "is not replaced" in refused("compile", checkpoint, tmp_path / "mine", "--overwrite")
    assert "must be of cpu, tpu, cuda" in refused("compile", checkpoint, tmp_path / "x", "--portable", "abacus")
    assert "holds no programs" in refused("generate", "a", "--model", checkpoint, "--programs", tmp_path / "mine")
