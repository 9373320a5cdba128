"""`jaxinf tune`: a small search from the command line, and what it refuses."""

import json
from pathlib import Path

import pytest
from tpu_compiler import needs_compiler

from jaxinf.aot import tuning
from jaxinf.aot.tuning import Search, Trial
from jaxinf.cli import main

CASE = "smollm-135m-576x1536-32-rows-int8"


@needs_compiler
def test_a_search_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "tuned.json"
    words = ["tune", "quantized_matmul", "--chip", "v5e", "--case", CASE, "--budget", "2"]
    assert main([*words, "--output", str(path)]) == 0
    said = capsys.readouterr()
    assert "best" in said.out
    assert "heuristic / best" in said.out
    assert "2 of 2 block sizes" in said.err
    ((bucket, entry),) = json.loads(path.read_text())["v5e"].items()
    assert bucket in said.out
    assert set(entry) == {"blocks", "ms", "case", "compiler", "date"}


@needs_compiler
@pytest.mark.parametrize(("heuristic", "written"), [(1.02, False), (1.10, True)])
def test_the_shipped_table_takes_what_pays(
    heuristic: float, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trials = (Trial({"m": 1}, 1, 1e-3), Trial({"m": 2}, 2, heuristic * 1e-3))
    found = Search("quantized_matmul", CASE, "v5e", "a bucket", "libtpu 1", 2, trials, (), {"m": 2})
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: found)
    monkeypatch.setattr(tuning, "shipped_table", lambda op: path)
    assert main(["tune", "quantized_matmul", "--chip", "v5e", "--case", CASE, "--write"]) == 0
    assert path.exists() == written
    assert ("not written" in capsys.readouterr().err) != written


@needs_compiler
def test_json(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "quantized_matmul", "--chip", "v5e", "--case", CASE, "--budget", "1", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["case"] == CASE
    assert document["best"]["blocks"] == document["heuristic"]
    assert document["best"]["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["attention", "--case", "x"], "op='attention'"),
        (["flash_attention", "--case", "x"], "case='x'"),
        (["flash_attention"], "--case --all-cases"),
        (["flash_attention", "--case", "llama3-8b-prefill-4k", "--budget", "0"], "at least 1"),
    ],
)
def test_bad_input(words: list[str], complaint: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", *words]) == 2
    assert complaint in capsys.readouterr().err


@needs_compiler
def test_an_unknown_chip(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "flash_attention", "--case", "llama3-8b-prefill-4k", "--chip", "v9"]) == 2
    assert "v5e" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "--help"]) == 0
    assert "jaxinf tune flash_attention --chip v6e" in capsys.readouterr().out
