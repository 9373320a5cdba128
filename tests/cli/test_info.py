"""`jaxinf info`."""

import json
from pathlib import Path

import jax
import pytest

from jaxinf.checkpoint import load
from jaxinf.core import from_record
from jaxinf.lm.architecture import architecture
from jaxinf.models import ModelSpec, presets


def test_numbers_of_a_checkpoint(run_json, checkpoint: Path) -> None:
    got = run_json("info", checkpoint)
    leaves = jax.tree.leaves(load(checkpoint).model)
    assert got["parameters"] == sum(x.size for x in leaves)
    assert got["active_parameters"] == got["parameters"]
    assert got["bytes"] == sum(x.nbytes for x in leaves)
    assert (got["dtype"], got["layers"], got["d_model"], got["vocab"], got["context"]) == (
        "float32",
        2,
        16,
        384,
        64,
    )
    entry = 2 * 1 * 8 * 4  # keys and values of one head of 8 in float32
    assert got["kv_bytes_per_token"] == entry
    assert got["kv_bytes_at_context"] == 64 * entry + 8 * entry
    assert from_record(ModelSpec, got["spec"]) == load(checkpoint).model.spec


def test_the_dtype_asked_for_counts(run_json, checkpoint: Path) -> None:
    whole, half = run_json("info", checkpoint), run_json("info", checkpoint, "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"
    for key in ("bytes", "kv_bytes_per_token", "kv_bytes_at_context"):
        assert half[key] * 2 == whole[key]
    assert half["parameters"] == whole["parameters"]


def test_a_table_for_people(run, checkpoint: Path) -> None:
    code, out, err = run("info", checkpoint)
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line]
    facts = {line[0]: line[1] for line in lines}
    assert facts["model"] == str(checkpoint)
    assert facts["shape"] == "2 layers of width 16, vocabulary 384, context 64"
    assert facts["weights"].endswith(" in float32")
    assert facts["KV"] == "cache    64 B a token, and at most 512 B in windows; 4.50 KiB a row at full context"
    assert [line[1] for line in lines[-2:]] == [
        "2/1 heads of 8, window 8, rope 10000  gated silu 24",
        "2/1 heads of 8, full, rope 10000      gated silu 24",
    ]


def test_layers_and_experts_of_presets(run) -> None:
    _, out, _ = run("info", "gemma-3-27b")
    assert [line.split("  ")[0] for line in out.splitlines()[-3:]] == ["10 x 5", "10 x 1", "2"]
    assert "weights     " in out
    assert "in bfloat16" in out
    _, out, _ = run("info", "mixtral-8x7b")
    assert "8 experts, 2 a token, gated silu 14,336" in out


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_can_be_told(run, name: str) -> None:
    code, out, _ = run("info", name)
    assert code == 0
    assert name in out


def test_config_alone_is_enough(run_json, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((checkpoint / "config.json").read_bytes())
    want = run_json("info", checkpoint)
    for given in (config, tmp_path):
        got = run_json("info", given)
        assert {k: v for k, v in got.items() if k != "model"} == {k: v for k, v in want.items() if k != "model"}


def test_weights_tell_the_dtype_that_a_config_leaves_out(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "goldens" / "llama_bf16"
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture(tmp_path / "config.json").dtype == "float32"
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert architecture(tmp_path).dtype == "bfloat16"
    assert architecture(tmp_path).folder == tmp_path


def test_bad_names(refused, checkpoint: Path, tmp_path: Path) -> None:
    said = refused("info", "lama")
    assert "there is no model 'lama'" in said
    assert "smollm2-135m" in said
    assert "no config.json" in refused("info", tmp_path)
    assert "neither a folder nor a config.json" in refused("info", checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    assert "'abacus' is not supported" in refused("info", tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "must hold a JSON object" in refused("info", tmp_path / "config.json")
