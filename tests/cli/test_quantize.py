"""`jaxinf quantize`: from folder to folder, and on with what an earlier run has finished."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from quantised_models import SPARSE, arrays, model

from jaxinf import compression
from jaxinf.checkpoint import load, save
from jaxinf.checkpoint.tensors import open_tensors
from jaxinf.cli import output
from jaxinf.compression import Calibration, stored
from jaxinf.compression.stored import quantize_folder
from pallas_kernels.errors import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = (ROOT / "tests" / "data" / "tokenizers" / "byte_level").glob("tokenizer*.json")
    return save(tmp_path_factory.mktemp("models") / "plain", model(SPARSE), tokenizer_files=tokenizer)


@pytest.mark.parametrize(("scheme", "to"), [("int8", "safetensors"), ("w8a8", "orbax")])
def test_a_folder_that_loads_as_what_it_says(
    run, run_json, source: Path, tmp_path: Path, scheme: str, to: str
) -> None:
    target = tmp_path / "narrow"
    code, out, err = run("quantize", source, target, "--scheme", scheme, "--to", to)
    assert code == 0, err
    assert out.startswith(f"{target}: {scheme}, ")
    assert "quantising: 100 % of " in err
    config = json.loads((target / "config.json").read_text())
    assert config["quantization"] == {
        "version": 1,
        "scheme": scheme,
        "activations": "int8" if scheme == "w8a8" else None,
    }
    assert (target / "tokenizer.json").is_file()
    assert arrays(load(target).model) == arrays(compression.quantize(load(source).model, scheme))
    assert [p.name for p in tmp_path.iterdir()] == ["narrow"]
    assert run_json("info", target)["quantized"] == "int8"


def test_groups_rules_and_json(run_json, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "narrow"
    rules = {"layers.*.attention.*": "int8", "layers.0.*": "keep"}
    given = [f"{pattern}={name}" for pattern, name in rules.items()]
    got = run_json("quantize", source, target, "--scheme", "int4", "--group", 16, "--rules", *given)
    assert got["scheme"] == "int4"
    assert sorted(got["files"]) == sorted(p.name for p in target.iterdir())
    want = compression.quantize(load(source, layout="list").model, "int4", group=16, rules=rules)
    assert arrays(load(target, layout="list").model) == arrays(want)


def test_bad_input_is_one_sentence(refused, run, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "narrow"
    assert "must be one of int8, int4, " in refused("quantize", source, target, "--scheme", "int5")
    said = refused("quantize", source, target, "--scheme", "int4", "--group", 24)
    assert "group=24 does not divide the 64 input channels; these do: 1, 2, 4, 8, 16, 32, 64" in said
    assert "matches nothing" in refused("quantize", source, target, "--rules", "layers.9.*=keep")
    assert "'int5' must be 'keep' or one of int8" in refused(
        "quantize", source, target, "--rules", "layers.1.*=int5"
    )
    assert "must be PATTERN=FORMAT" in refused("quantize", source, target, "--rules", "layers")
    assert "give --calibration FILE" in refused("quantize", source, target, "--scheme", "gptq")
    assert "holds source" in refused("quantize", source, source.parent, "--overwrite")
    (tmp_path / "short.txt").write_text("few words")
    said = refused("quantize", source, target, "--scheme", "awq", "--calibration", tmp_path / "short.txt")
    assert "the calibration text has 10 tokens, but 64 rows of 64 need 4096" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt"]
    assert run("quantize", source, target)[0] == 0
    assert "is there already" in refused("quantize", source, target)
    assert "is quantised already (int8)" in refused("quantize", target, tmp_path / "again")
    assert "is quantised already (int8)" in refused("generate", "x", "--model", target, "--quantize", "int8")


def test_nan_is_named_and_no_folder_appears(run, tmp_path: Path) -> None:
    sick = model(SPARSE)
    kernel = sick.segments[0].blocks[1].attention.out.kernel
    kernel.set_value(kernel.get_value().at[3, 4].set(jnp.nan))
    save(tmp_path / "sick", sick)
    code, out, err = run("quantize", tmp_path / "sick", tmp_path / "narrow")
    assert (code, out) == (2, "")
    assert "jaxinf: tensor layers.1.attention.out.kernel holds values that are NaN" in err
    assert [p.name for p in tmp_path.iterdir()] == ["sick"]


def small(source: Path, target: Path, scheme: str = "int8", **options) -> tuple[list[str], list[int]]:
    """Quantises in small files: what was said, and the bytes of progress."""
    said, seen = [], []
    quantize_folder(
        source,
        target,
        scheme,
        shard_bytes=20_000,
        note=said.append,
        progress=lambda done, total: seen.append(done),
        **options,
    )
    return said, seen


class Killed(BaseException):
    pass


def killed_after(source: Path, target: Path, calls: int, scheme: str = "int8", **options) -> None:
    """A run that ends once its progress was heard of so many times."""

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Killed

    with pytest.raises(Killed):
        quantize_folder(source, target, scheme, shard_bytes=20_000, progress=progress, **options)


def test_a_second_run_goes_on_where_the_first_ended(source: Path, tmp_path: Path) -> None:
    target, work = tmp_path / "narrow", tmp_path / ".narrow.unfinished"
    killed_after(source, target, 40)
    assert not target.exists()
    done = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (work / "files").glob("*.safetensors")}
    assert len(done) > 1
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(work / "files")
    said, seen = small(source, target)
    assert said == [f"going on with .narrow.unfinished: {len(done)} files are there"]
    assert seen == sorted(seen)
    for name, before in done.items():
        after = (target / name).stat()
        assert (after.st_mtime_ns, after.st_ino) == before
    assert arrays(load(target).model) == arrays(compression.quantize(load(source).model, "int8"))
    assert [p.name for p in tmp_path.iterdir()] == ["narrow"]


def test_what_was_begun_otherwise_is_begun_anew(source: Path, tmp_path: Path) -> None:
    target, work = tmp_path / "narrow", tmp_path / ".narrow.unfinished"
    other = save(tmp_path / "plain", model(SPARSE, dtype=jnp.bfloat16))
    killed_after(source, target, 40)
    killed_after(source, target, 40, "fp8_e4m3")
    before = {p.name for p in (work / "files").iterdir()}
    said, _ = small(source, target, "int8", overwrite=True)
    assert said == [".narrow.unfinished was begun with another scheme; starting anew"]
    assert before
    assert arrays(load(target).model) == arrays(compression.quantize(load(source).model, "int8"))
    killed_after(source, tmp_path / "two", 40)
    said, _ = small(other, tmp_path / "two")
    assert said == [".two.unfinished was begun with another source, options; starting anew"]
    want = compression.quantize(load(other).model, "int8")
    assert arrays(load(tmp_path / "two").model) == arrays(want)
    # A file that was cut short is made again.
    killed_after(source, tmp_path / "three", 40)
    torn = sorted((tmp_path / ".three.unfinished" / "files").glob("*.safetensors"))[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    small(source, tmp_path / "three")
    assert arrays(load(tmp_path / "three").model) == arrays(load(target).model)


def test_ctrl_c_keeps_what_is_done(run, source: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "_lines", lambda label, unit: interrupt)
    code, _, err = run("quantize", source, tmp_path / "narrow")
    assert code == 130
    assert err.startswith(f"what is done is kept in {tmp_path / '.narrow.unfinished'} for the same command")
    assert [p.name for p in tmp_path.iterdir()] == [".narrow.unfinished"]


@pytest.mark.slow
def test_generate_rounds_while_it_loads(run, checkpoint: Path) -> None:
    code, out, err = run("generate", "import ", "--model", checkpoint, "--quantize", "int8", "--max-new-tokens", 3)
    assert code == 0, err
    assert out


def test_two_runs_do_not_meet(source: Path, tmp_path: Path) -> None:
    met = []

    def progress(done: int, total: int) -> None:
        if not met:
            with pytest.raises(CheckpointError, match="another process is at work in") as error:
                quantize_folder(source, tmp_path / "narrow")
            met.append(error)

    quantize_folder(source, tmp_path / "narrow", progress=progress)
    assert met
    assert load(tmp_path / "narrow").model.spec == SPARSE


KILLED = """
import os, signal, sys
from jaxinf.compression.stored import quantize_folder
def progress(done, total):
    print(done, total, flush=True)
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_folder(sys.argv[1], sys.argv[2], shard_bytes=20_000, progress=progress)
"""


def test_kill_9_half_way(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "narrow"
    command = [sys.executable, "-c", KILLED, str(source), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    said, _ = small(source, target)
    assert said[0].startswith("going on with .narrow.unfinished")
    assert arrays(load(target).model) == arrays(compression.quantize(load(source).model, "int8"))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    tokens = np.random.default_rng(0).integers(0, SPARSE.vocab, (8, 32))
    return Calibration(tokens, batch=4)


@pytest.mark.parametrize("scheme", ["gptq", pytest.param("llm-int8", marks=pytest.mark.slow)])
def test_calibrated_layer_by_layer(scheme: str, source: Path, tmp_path: Path, calibration: Calibration) -> None:
    target = tmp_path / "narrow"
    killed_after(source, target, 2, scheme, calibration=calibration)
    assert not target.exists()
    assert (tmp_path / ".narrow.unfinished" / "files" / "hidden-2.safetensors").is_file()
    said, seen = small(source, target, scheme, calibration=calibration)
    assert said[0].startswith("going on with .narrow.unfinished")
    assert seen == [1, 2, 3, 4]
    want = compression.quantize(load(source, layout="list").model, scheme, calibration=calibration)
    assert arrays(load(target, layout="list").model) == arrays(want)
    assert not list(target.glob("hidden*"))
    assert json.loads((target / "config.json").read_text())["quantization"]["scheme"] == scheme


def test_calibration_text_is_taken_from_files(run, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    given = []
    monkeypatch.setattr(stored, "quantize_folder", lambda *_, **options: given.append(options["calibration"]))
    for name, text in (("a", "import os\n" * 10), ("b", "import sys\n" * 10)):
        (tmp_path / name).write_text(text)
    files = ["--calibration", tmp_path / "a", tmp_path / "b", "--rows", 2, "--length", 32]
    assert run("quantize", checkpoint, tmp_path / "narrow", "--scheme", "awq", *files)[0] == 0
    assert given[0].tokens.shape == (2, 32)
    (tmp_path / "c").write_bytes(b"\xff")
    files[1] = tmp_path / "c"
    code, _, err = run("quantize", checkpoint, tmp_path / "narrow", "--scheme", "awq", *files)
    assert code == 2
    assert "c is not UTF-8 text" in err


@pytest.mark.slow
def test_calibrated_with_files(run, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("import os\nprint(os.getcwd())\n" * 20)
    options = ["--scheme", "smoothquant", "--calibration", text, "--rows", 4, "--length", 32]
    code, _, err = run("quantize", checkpoint, tmp_path / "narrow", *options)
    assert code == 0, err
    assert "quantising: 2 of 2 layers" in err
    assert len(open_tensors(tmp_path / "narrow")) > 20
    assert load(tmp_path / "narrow").model.spec.depth == 2
