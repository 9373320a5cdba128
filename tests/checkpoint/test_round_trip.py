"""The project's own form: bit for bit there and back, whatever the layout and the keeping of weights."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from jaxinf.checkpoint import convert, load, read_spec, save, save_orbax
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, fold
from pallas_kernels.errors import CheckpointError, InputError

GOLDENS = Path(__file__).parents[1] / "goldens"
ATTENTION = AttentionSpec(4, 2, 8, rope=RopeSpec(8), sinks=True)
DENSE = LayerSpec(ATTENTION, FFNSpec(24))
SPARSE = LayerSpec(ATTENTION, MoESpec(3, 8, TokenChoice(top_k=2, selection_bias=True)))
# A lead, a period of two three times over, and a remainder.
SPEC = ModelSpec(40, 16, fold([SPARSE, *[DENSE, SPARSE] * 3, DENSE, DENSE]), 64)


def model(layout: str = "list", dtype=jnp.bfloat16) -> CausalLM:
    return CausalLM(SPEC, rngs=nnx.Rngs(1), param_dtype=dtype, layout=layout)


def bits(model: CausalLM) -> dict[tuple, tuple]:
    state = nnx.to_flat_state(nnx.state(model))
    return {path: (v[...].shape, str(v[...].dtype), np.asarray(v[...]).tobytes()) for path, v in state}


@pytest.fixture
def tokenizer(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"]
    for file in files:
        file.write_text("{}")
    return files


@pytest.mark.parametrize("write", [save, save_orbax])
@pytest.mark.parametrize("to", ["list", "stacked"])
def test_layouts_are_the_readers_choice(write, to: str, tmp_path: Path, tokenizer: list[Path]) -> None:
    for made in ("list", "stacked"):
        generation = {"eos_token_id": [3, 4], "temperature": 0.7}
        folder = tmp_path / made
        write(folder, model(made), tokenizer_files=tokenizer, generation=generation)
        loaded = load(folder, layout=to)
        assert bits(loaded.model) == bits(model(to))
        assert loaded.model.layout == to
        assert loaded.generation == generation
        assert loaded.folder == folder
        assert all((folder / file.name).is_file() for file in tokenizer)


def test_names_tell_the_layer_and_not_the_layout(tmp_path: Path) -> None:
    save(tmp_path / "m", model("stacked"))
    with safe_open(tmp_path / "m" / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert {"embed.table", "final_norm.scale", "head.kernel", "layers.8.attention.query.kernel"} <= names
    assert {"layers.0.ffn.experts.up", "layers.0.ffn.selection_bias", "layers.1.ffn.up.kernel"} <= names
    assert not any(name.startswith("layers.9") for name in names)


@pytest.mark.parametrize("case", ["gpt_oss", "llama_bf16", "gpt2"])
def test_from_published_to_ours_to_orbax_and_back(case: str, tmp_path: Path) -> None:
    start = load(GOLDENS / case)
    seen = []
    convert(GOLDENS / case, tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    convert(tmp_path / "a", tmp_path / "b", to="orbax")
    convert(tmp_path / "b", tmp_path / "c", shard_bytes=20_000)
    assert (tmp_path / "a" / "model.safetensors").is_file()
    assert (tmp_path / "b" / "weights").is_dir()
    assert len(list((tmp_path / "c").glob("model-*-of-*.safetensors"))) > 1
    for folder in ("a", "b", "c"):
        end = load(tmp_path / folder)
        assert end.model.spec == start.model.spec
        assert bits(end.model) == bits(start.model)
        assert end.generation == start.generation
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_dtype_is_given_or_the_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "m", model(dtype=jnp.float32))
    assert load(tmp_path / "m").model.dtype == jnp.float32
    half = load(tmp_path / "m", dtype="bfloat16").model
    expected = jnp.asarray(model(dtype=jnp.float32).embed.table[...], jnp.bfloat16)
    np.testing.assert_array_equal(half.embed.table[...], expected)
    # What chooses experts stays in float32.
    assert half.segments[0].blocks[0].ffn.selection_bias[...].dtype == jnp.float32
    convert(tmp_path / "m", tmp_path / "half", dtype="bfloat16")
    assert bits(load(tmp_path / "half").model) == bits(half)


def test_a_folder_is_not_replaced_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save(folder, model())
    before = (folder / "model.safetensors").read_bytes()
    for write in (save, save_orbax):
        with pytest.raises(CheckpointError, match=r"m exists already; give another name, or overwrite=True"):
            write(folder, model(dtype=jnp.float32))
    with pytest.raises(CheckpointError, match="exists already"):
        convert(GOLDENS / "llama", folder)
    assert (folder / "model.safetensors").read_bytes() == before
    save(folder, model(dtype=jnp.float32), overwrite=True)
    assert load(folder).model.dtype == jnp.float32
    convert(folder, folder, dtype="bfloat16", overwrite=True)
    assert load(folder).model.dtype == jnp.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("Dear")
    with pytest.raises(CheckpointError, match="letters is no checkpoint"):
        save(tmp_path / "letters", model(), overwrite=True)
    with pytest.raises(CheckpointError, match=r"mother\.txt is a file"):
        save(tmp_path / "letters" / "mother.txt", model(), overwrite=True)
    save(tmp_path / "outer", model())
    save(tmp_path / "outer" / "inner", model())
    with pytest.raises(InputError, match="outer holds source"):
        convert(tmp_path / "outer" / "inner", tmp_path / "outer", overwrite=True)
    assert (tmp_path / "outer" / "inner" / "config.json").is_file()


def test_a_failure_leaves_nothing_and_spares_what_was_there(tmp_path: Path) -> None:
    save(tmp_path / "good", model())
    before = (tmp_path / "good" / "model.safetensors").read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for target in ("good", "new"):
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / target, model(dtype=jnp.float32), overwrite=True, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    assert (tmp_path / "good" / "model.safetensors").read_bytes() == before


# A limit on the size of files makes writes fail as a full disk does.
FULL = """
import resource, sys
from jaxinf.checkpoint import convert
from pallas_kernels.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
try:
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
except CheckpointError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("to", "why"),
    # Which of orbax's own writes and ours meets the limit first depends on the version and on its threads.
    [
        ("safetensors", "cannot write .*: File too large"),
        ("orbax", "(orbax cannot|cannot write .*: File too large)"),
    ],
)
def test_a_disk_that_refuses_leaves_nothing(to: str, why: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(GOLDENS / "llama"), str(tmp_path / "new"), to]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"{why}.*; nothing was left behind\n", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*new: the disk is full; nothing was left behind"):
        convert(GOLDENS / "llama", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_spec_is_read_without_weights(tmp_path: Path) -> None:
    save(tmp_path / "m", model())
    (tmp_path / "m" / "model.safetensors").unlink()
    assert read_spec(tmp_path / "m") == SPEC
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2 of this format; this build reads 1"):
        read_spec(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"spec": {"vocab": 40}}))
    with pytest.raises(CheckpointError, match="does not describe a model: spec: ModelSpec needs d_model"):
        read_spec(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"speck": 1}))
    with pytest.raises(CheckpointError, match="not understood: speck"):
        read_spec(tmp_path / "m")
