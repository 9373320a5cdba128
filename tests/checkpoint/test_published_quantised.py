"""Quantised checkpoints in the layouts that other projects publish (`published_layouts`).

What is written stands for known matrices, which a plain checkpoint holds beside: both give the same logits.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published_layouts import (
    BITS4,
    CASES,
    FFN,
    INPUTS,
    VOCAB,
    D,
    compressed,
    gptq,
    int_quantized,
    mxfp4,
    pair,
    write,
)
from quantised_models import arrays, dequantised
from safetensors.numpy import load_file, save_file

from jaxinf.checkpoint import convert, load
from jaxinf.checkpoint.published import decoded
from jaxinf.checkpoint.quantization import Quantization
from jaxinf.checkpoint.tensors import Tensors as Stored
from jaxinf.models import CausalLM
from jaxinf.models.placing import place_model
from jaxinf.quant import QTensor
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError
from sharding import meshes

pytestmark = pytest.mark.filterwarnings("ignore:mesh=")
TOKENS = np.arange(12).reshape(1, 12) * 5 % VOCAB


@jax.jit
def logits(model: CausalLM) -> jax.Array:
    return model(jnp.asarray(TOKENS))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_matrices_it_stands_for(case: str, tmp_path: Path) -> None:
    section, writer, codes = CASES[case]
    narrow, plain = pair(tmp_path, section, writer)
    got, want = load(narrow, layout="list").model, load(plain, layout="list").model
    value = got.segments[0].blocks[0].ffn.down.kernel.get_value()
    assert isinstance(value, QTensor)
    assert str(value.values.dtype) == codes
    assert (value.order is not None) == ("order" in case)
    for a, b in zip(got.segments[0].blocks, want.segments[0].blocks, strict=True):
        matrix = b.attention.key.kernel.get_value()
        np.testing.assert_allclose(a.attention.key.kernel.get_value().dequantize(), matrix, rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits(got), logits(want), rtol=0, atol=1e-5 * float(jnp.abs(logits(want)).max()))
    if case in ("awq", "gptq in an order", "bitsandbytes nf4, nested"):
        # In our own form it is the same, array by array.
        kept = convert(narrow, tmp_path / "kept")
        assert arrays(load(kept, layout="list").model) == arrays(got)
        scheme = json.loads((kept / "config.json").read_text())["quantization"]["scheme"]
        assert scheme == {"awq": "awq", "gptq in an order": "gptq"}.get(case, "nf4")


def test_inputs_are_rounded_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    section = compressed(8, "int-quantized", "channel", INPUTS)
    narrow, plain = pair(tmp_path, section, int_quantized)
    got, want = load(narrow).model, load(plain).model
    quantised = [
        q for q in jax.tree.leaves(got, is_leaf=lambda x: isinstance(x, QTensor)) if isinstance(q, QTensor)
    ]
    assert len(quantised) == 7
    assert all(q.activations == "int8" for q in quantised)
    far = np.abs(logits(got) - logits(want)).max() / np.abs(logits(want)).max()
    assert 1e-6 < far < 0.05


def test_experts_in_mxfp4(golden: Callable[..., Path], tmp_path: Path) -> None:
    narrow, plain = mxfp4(golden)
    got, want = load(narrow).model, load(plain).model
    experts = got.segments[0].blocks[0].ffn.experts
    assert str(experts.up.get_value().scales.dtype) == "float8_e8m0fnu"
    np.testing.assert_allclose(logits(got), logits(want), rtol=0, atol=1e-5 * float(jnp.abs(logits(want)).max()))
    kept = convert(narrow, tmp_path / "kept")
    assert arrays(load(kept).model) == arrays(got)
    mesh = "expert=2,tensor=2"
    assert arrays(load(narrow, mesh=mesh).model) == arrays(place_model(got, meshes.make(mesh)))


@pytest.mark.parametrize("case", ["phi3", "mixtral", "falcon_new"])
def test_matrices_that_a_family_keeps_together(case: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    plain, rng = golden(case), np.random.default_rng(2)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [
        n for n, t in tensors.items() if t.ndim == 2 and not any(k in n for k in ("embed", "head", "gate."))
    ]:
        module = name.removesuffix(".weight")
        new, matrix = int_quantized(module, rng, tensors[name].shape)
        stored |= new
        tensors[name] = matrix.astype(np.float32)
    save_file(tensors, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = compressed(8, "int-quantized", "channel")
    got, want = load(write(tmp_path / "narrow", config, stored)).model, load(plain).model
    made = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(got))]
    assert sum(isinstance(value, QTensor) for value in made) > 4
    for a, b in zip(jax.tree.leaves(dequantised(got)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_on_meshes_and_in_stacks(tmp_path: Path) -> None:
    narrow, _ = pair(tmp_path, BITS4 | {"sym": False}, gptq(4, symmetric=False))
    whole = load(narrow, layout="stacked").model
    got = load(narrow, layout="stacked", mesh="tensor=2").model
    assert arrays(got) == arrays(place_model(whole, meshes.make("tensor=2")))
    (tmp_path / "b").mkdir()
    ordered, _ = pair(tmp_path / "b", BITS4 | {"desc_act": True}, gptq(4, ordered=True))
    with pytest.raises(
        UnsupportedError, match=r"order of their own \(GPTQ with desc_act\), so a mesh cannot split"
    ):
        load(ordered, mesh="tensor=2")
    assert load(ordered, mesh="data=2").model.spec == whole.spec


def broken(folder: Path, **changes: Any) -> Path:
    """The folder with other tensors: None takes one away."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = f"model.layers.0.mlp.up_proj.{key}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "bits": (BITS4 | {"bits": 3}, {}, "weights of 3 bits are not read; those of 2, 4 and 8 are"),
    "format": (BITS4 | {"checkpoint_format": "marlin"}, {}, "checkpoint_format='marlin' is not supported"),
    "lie": (
        BITS4,
        {"qzeros": np.zeros((2, FFN // 8), np.int32)},
        "up_proj.qzeros holds zero points that are not 8",
    ),
    "lost": (BITS4, {"qzeros": None}, "a quantised module has no model.layers.0.mlp.up_proj.qzeros"),
    "shape": (
        BITS4,
        {"scales": np.ones((2, 8), np.float16)},
        r"up_proj.scales has shape \[2, 8\], where its module",
    ),
    "groups": (BITS4, {"g_idx": np.zeros(D, np.int32)}, "up_proj.g_idx has groups of different sizes"),
    "nan": (
        BITS4,
        {"scales": np.full((2, FFN), np.inf, np.float16)},
        "up_proj.weight.scales holds values that are NaN",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    section, changes, match = BAD[case]
    narrow, _ = pair(tmp_path, section, gptq(4))
    with pytest.raises((CheckpointError, UnsupportedError), match=match):
        load(broken(narrow, **changes))


def test_what_other_ways_say_that_is_not_read(tmp_path: Path) -> None:
    narrow, _ = pair(tmp_path, BITS4, gptq(4))

    def refused(match: str, **section: Any) -> None:
        config = json.loads((narrow / "config.json").read_text())
        (narrow / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
        with pytest.raises((CheckpointError, UnsupportedError), match=match):
            load(narrow)

    refused("version='gemv' is not read; gemm is", quant_method="awq", bits=4, version="gemv")
    refused("format='marlin-24' is not read", quant_method="compressed-tensors", format="marlin-24")
    static = compressed(8, "int-quantized", "channel", dict(INPUTS, dynamic=False))
    refused("dynamic=False is not supported; it must be True", **static)
    rotated = compressed(8, "int-quantized", "channel") | {"transform_config": {"config_groups": {"R1": {}}}}
    refused("transform_config=.* is not supported", **rotated)
    sparse = compressed(8, "int-quantized", "channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}
    refused("sparsity_config=.* is not read", **sparse)
    refused("but none is; the checkpoint is not whole", quant_method="bitsandbytes", load_in_8bit=True)
    config = json.loads((narrow / "config.json").read_text()) | {"quantization_config": BITS4}
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is quantised already \(gptq\)"):
        load(narrow, quantize="int8")


def test_what_several_parameters_are_cut_from_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def array(name: str, size: int) -> decoded.Array:
        return decoded.Array(np.int8, (size,), lambda: (made.append(name), np.zeros(size, np.int8))[1])

    monkeypatch.setattr(decoded, "_BESIDE", 10)
    sizes = {"a.values": 100, "a.scales": 8, "b.values": 90, "b.scales": 8}
    decoding = decoded.Decoding(Quantization("int8"), {name: array(name, size) for name, size in sizes.items()})
    tensors = decoded.Decoded(Stored({}), decoding)
    for name in ("a.values", "a.scales", "a.values", "a.scales", "b.values", "b.scales", "b.values", "a.values"):
        assert tensors.read(name).shape == (sizes[name],)
    assert made == ["a.values", "a.scales", "b.values", "b.scales", "a.values"]
