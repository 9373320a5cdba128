"""Weights under the several names that published files give them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxinf.checkpoint import load


def values(folder: Path) -> dict[tuple, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(load(folder).model))
    return {path: np.asarray(v[...]) for path, v in state}


def rename(folder: Path, change: Callable[[str], str], **more: np.ndarray) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): t for name, t in tensors.items()} | more, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "prefix"), [("llama", "model."), ("gpt2", "transformer."), ("bloom", "transformer.")]
)
def test_a_base_model_has_no_prefix(case: str, prefix: str, golden) -> None:
    folder = golden(case)
    before = values(folder)
    rename(folder, lambda name: name.removeprefix(prefix))
    after = values(folder)
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("form", ["config.json", "config_v4.json"])
def test_the_text_half_of_a_model_of_images(prefix: str, form: str, golden) -> None:
    folder = golden("gemma3", form)
    before = values(folder)
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    ones = np.ones(3, np.float32)
    vision = {"vision_tower.x.weight": ones, "model.vision_tower.x.bias": ones, "multi_modal_projector.y": ones}
    rename(folder, lambda name: prefix + name.removeprefix("model."), **vision)
    after = values(folder)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_linear_maps_are_transposed_and_fused_ones_split(golden) -> None:
    folder = golden("phi3_partial")
    tensors = load_file(folder / "model.safetensors")
    attention = load(folder).model.segments[0].blocks[1].attention
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    q, k, v = np.split(fused, [32, 48])
    for part, expected in ((attention.query, q), (attention.key, k), (attention.value, v)):
        np.testing.assert_array_equal(part.kernel[...], expected.T)


def test_heads_that_are_stored_together_are_told_apart(golden) -> None:
    folder = golden("falcon_new")
    fused = load_file(folder / "model.safetensors")["transformer.h.0.self_attention.query_key_value.weight"]
    attention = load(folder).model.segments[0].blocks[0].attention
    # Two groups of two queries, a key and a value, of six channels each.
    rows = fused.reshape(2, 4, 6, 24)
    np.testing.assert_array_equal(attention.query.kernel[...], rows[:, :2].reshape(24, 24).T)
    np.testing.assert_array_equal(attention.key.kernel[...], rows[:, 2].reshape(12, 24).T)
    np.testing.assert_array_equal(attention.value.kernel[...], rows[:, 3].reshape(12, 24).T)
