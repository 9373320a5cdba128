"""`jaxinf plan`: the report, the table, JSON, exit codes."""

import json
from pathlib import Path

import pytest
from tpu_compiler import needs_compiler

from jaxinf.cli import main
from jaxinf.lm import architecture

LLAMA = ("plan", "llama-3.1-70b", "--quantize", "int8", "--batch", "16", "--context", "4096", "--arithmetic")


def test_the_report(run) -> None:
    code, out, err = run(*LLAMA, "--tpu", "v5e-16")
    assert code == 0, err
    assert "llama-3.1-70b in int8 on v5e-16: 16 chips, 4x4; mesh tensor=16" in out
    for word in ("weights", "cache", "temporaries", "peak", "HBM"):
        assert word in out
    assert "decode:" in out
    assert "prefill:" in out
    assert "all-reduce  tensor  16" in out
    assert "largest batch at this context" in out
    assert "the best" in out
    assert "arithmetic alone" in out


def test_json(run_json) -> None:
    document = run_json(*LLAMA, "--tpu", "v5e-16", "--price", "v5e=1.2")
    assert document["tpu"] == "v5e-16"
    assert document["fits"]
    hours = document["chip_hours_per_million_tokens"]
    assert document["cost_per_million_tokens"] == pytest.approx(1.2 * hours)


def test_what_does_not_fit_has_an_exit_code_of_its_own(run) -> None:
    code, out, _ = run("plan", "llama-3.1-70b", "--tpu", "v5e-4", "--arithmetic")
    assert code == 3
    assert "DOES NOT FIT" in out
    assert "take --quantize int4 or --tpu v5e-16" in out


def test_a_narrow_cache(run, run_json) -> None:
    code, out, err = run(*LLAMA, "--tpu", "v5e-16", "--cache", "int8")
    assert code == 0, err
    assert "llama-3.1-70b in int8 (cache in int8) on v5e-16" in out
    cache = {
        k: run_json(*LLAMA, "--tpu", "v5e-16", *k)["per_chip_bytes"]["cache"] for k in ((), ("--cache", "int8"))
    }
    assert cache["--cache", "int8"] == pytest.approx(cache[()] * (128 + 4) / 256, rel=1e-6)
    code, _, err = run(*LLAMA, "--tpu", "v5e-16", "--cache", "int3")
    assert code == 2
    assert "choose from" in err


def test_slices_side_by_side(run, run_json) -> None:
    words = ("plan", "qwen3-8b", "--compare", "v5e-4,v6e-4,v6e-1", "--batch", "32", "--arithmetic")
    code, out, _ = run(*words, "--price", "v5e=1.2")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["v5e-4", "v6e-4", "v6e-1"]
    assert "v6e-1 does not fit; take" in out
    assert [d["tpu"] for d in run_json(*words)] == ["v5e-4", "v6e-4", "v6e-1"]


def test_a_picture(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = run(*LLAMA, "--tpu", "v5e-16", "--picture", tmp_path / "memory.png")
    assert code == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "memory.png" in err


def test_a_folder_and_a_config(run_json, checkpoint: Path) -> None:
    words = ("--tpu", "v5e-1", "--context", "64", "--arithmetic")
    folder = run_json("plan", checkpoint, *words)
    config = run_json("plan", checkpoint / "config.json", *words)
    assert folder["per_chip_bytes"] == config["per_chip_bytes"]


def test_of_the_hub_the_config_alone_is_fetched(run_json, checkpoint: Path, monkeypatch, tmp_path: Path) -> None:
    fetched = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        return tmp_path

    monkeypatch.setattr(architecture, "fetch_config", fetch)
    document = run_json("plan", "someone/tiny", "--tpu", "v5e-1", "--context", "64", "--arithmetic")
    assert fetched == ["someone/tiny"]
    assert document["model"] == "someone/tiny"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("llama-3.1-8b", "--tpu", "v5e-12"), "v5e-8, v5e-16"),
        (("llama-3.1-8b", "--tpu", "h100-8"), "v5e"),
        (("llama-9", "--tpu", "v5e-8"), "llama-3.1-8b"),
        (("llama-3.1-8b", "--tpu", "v5e-8", "--mesh", "tensor=3"), "heads=32"),
        (("llama-3.1-8b", "--tpu", "v5e-8", "--mesh", "tensor=16"), "needs 16 devices, but v5e-8 has 8"),
        (("llama-3.1-8b", "--tpu", "v5e-8", "--mesh", "pipeline=5"), "pipeline may be 1, 2, 4, 8, 16, 32"),
        (("mixtral-8x7b", "--tpu", "v5e-16", "--mesh", "expert=3"), "experts=8"),
        (("llama-3.1-8b", "--tpu", "v5e-8", "--mesh", "rows=2"), "rows"),
        (("llama-3.1-8b", "--tpu", "v5e-8", "--price", "v5e"), "such as v5e=1.2"),
        (("llama-3.1-8b", "--tpu", "v5e-8", "--context", "200000"), "131072"),
        (("llama-3.1-8b", "--compare", "v5e-8,v5e-8"), "twice"),
    ],
)
def test_bad_input(refused, words: tuple[str, ...], says: str) -> None:
    assert says in refused("plan", *words, "--arithmetic")


def test_a_slice_must_be_named(refused) -> None:
    assert "--tpu" in refused("plan", "llama-3.1-8b")


def test_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--help"]) == 0
    assert "jaxinf plan llama-3.1-70b --tpu v5e-16 --quantize int8" in capsys.readouterr().out


@needs_compiler
def test_through_the_compiler(capsys: pytest.CaptureFixture, checkpoint: Path) -> None:
    words = ["plan", str(checkpoint), "--tpu", "v5e-4", "--mesh", "data=2,tensor=2", "--batch", "4"]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert "libtpu" in document["compiler"]
    assert document["decode"]["witness"] != "arithmetic", document["notes"]
    assert "compiling" in said.err
