"""`jaxinf convert`."""

import errno
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinf.checkpoint import load

ROOT = Path(__file__).parents[2]


def weights(folder: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load(folder).model)]


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_a_copy_in_another_form(run, checkpoint: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / "copy"
    code, out, err = run("convert", checkpoint, target, "--to", form)
    assert code == 0, err
    assert out.startswith(f"{target}: ")
    assert "writing: 100 % of " in err
    assert (target / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    for got, want in zip(weights(target), weights(checkpoint), strict=True):
        np.testing.assert_array_equal(got, want)


def test_dtype_and_json(run_json, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "narrow"
    got = run_json("convert", checkpoint, target, "--dtype", "bfloat16")
    assert str(load(target).model.dtype) == "bfloat16"
    assert got["target"] == str(target)
    assert sorted(got["files"]) == sorted(p.name for p in target.iterdir())
    assert got["bytes"] == sum(p.stat().st_size for p in target.iterdir())


def test_what_is_there_is_replaced_only_if_asked(run, refused, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "--overwrite" in refused("convert", checkpoint, target)
    assert "is no checkpoint" in refused("convert", checkpoint, target, "--overwrite")
    assert [p.name for p in target.iterdir()] == ["notes.txt"]

    other = tmp_path / "other"
    assert run("convert", checkpoint, other)[0] == 0
    assert run("convert", checkpoint, other, "--overwrite", "--dtype", "float16")[0] == 0
    assert str(load(other).model.dtype) == "float16"


@pytest.mark.parametrize(("form", "writer"), [("safetensors", "write"), ("orbax", "write_orbax")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    run, refused, checkpoint: Path, tmp_path: Path, monkeypatch, form: str, writer: str, overwrite: bool
) -> None:
    from jaxinf.checkpoint import converting

    target = tmp_path / "copy"
    if overwrite:
        assert run("convert", checkpoint, target)[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(folder: Path, *arguments, **options) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converting, writer, full)
    flags = ["--overwrite"] * overwrite
    said = refused("convert", checkpoint, target, "--to", form, *flags, code=1)
    assert "disk is full" in said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert list(tmp_path.iterdir()) == [target] * overwrite


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_a_disk_that_takes_no_more_is_one_sentence(checkpoint: Path, tmp_path: Path, form: str) -> None:
    """The system's own refusal, in a process of its own: what other threads say of it counts too."""
    code = (
        "import resource, sys\n"
        "from jaxinf.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "convert", str(checkpoint), str(tmp_path / "copy"), "--to", form]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("writing: ")]
    assert said == [f"jaxinf: cannot write {tmp_path / 'copy'}: File too large; nothing was left behind"]
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_no_checkpoint(refused, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    assert "there is no model 'nowhere'" in refused("convert", "nowhere", target)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refused("convert", empty, target)

    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    data = (checkpoint / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[:-1])
    assert "truncated" in refused("convert", torn, target)
    assert not target.exists()


def test_nan_in_weights_is_found_and_nothing_stays(run, checkpoint: Path, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    sick.mkdir()
    (sick / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    (sick / "model.safetensors").write_bytes(data)
    code, out, err = run("convert", sick, tmp_path / "copy")
    assert (code, out) == (2, "")
    *progress, said = err.splitlines()
    assert said.startswith("jaxinf: tensor layers.1.ffn_norm.scale holds values that are NaN")
    assert all(line.startswith("writing: ") for line in progress)
    assert [p.name for p in tmp_path.iterdir()] == ["sick"]
