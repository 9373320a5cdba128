"""Quantised checkpoints in the layouts that other projects publish, each written here code by code.

What is written stands for known matrices, which a plain checkpoint holds beside: both give the same logits. The
packers follow the words and shifts of the layouts, none of the readers' code; each names its source.
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
D, FFN, VOCAB, GROUP = 64, 128, 32, 32
LLAMA = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": FFN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "torch_dtype": "float32",
}
MATRICES = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D // 2, D),
    "self_attn.v_proj": (D // 2, D),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (FFN, D),
    "mlp.up_proj": (FFN, D),
    "mlp.down_proj": (D, FFN),
}
"""`[out, in]`."""
Tensors = dict[str, Any]
Writer = Callable[[str, np.random.Generator, tuple[int, int]], tuple[Tensors, np.ndarray]]
"""From a module's name and its shape `[out, in]` to what is stored, and the matrix that it stands for."""
TOKENS = np.arange(12).reshape(1, 12) * 5 % VOCAB


def write(at: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    at.mkdir()
    (at / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, at / "model.safetensors")
    return at


def pair(at: Path, section: dict[str, Any], writer: Writer) -> tuple[Path, Path]:
    """A quantised checkpoint, and the plain one that it stands for."""
    rng = np.random.default_rng(0)
    rest = {"model.norm.weight": np.ones(D, np.float32)}
    for name in ("model.embed_tokens", "lm_head"):
        rest[f"{name}.weight"] = rng.normal(size=(VOCAB, D)).astype(np.float32)
    narrow, plain = dict(rest), dict(rest)
    for i in range(LLAMA["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            narrow[f"model.layers.{i}.{norm}.weight"] = plain[f"model.layers.{i}.{norm}.weight"] = np.ones(
                D, np.float32
            )
        for module, shape in MATRICES.items():
            name = f"model.layers.{i}.{module}"
            stored, matrix = writer(name, rng, shape)
            narrow |= stored
            plain[f"{name}.weight"] = matrix.astype(np.float32)
    return write(at / "narrow", LLAMA | {"quantization_config": section}, narrow), write(at / "plain", LLAMA, plain)


@jax.jit
def logits(model: CausalLM) -> jax.Array:
    return model(jnp.asarray(TOKENS))


def scales_of(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.uniform(0.5, 1.5, shape) / 40).astype(np.float16)


def word(codes: np.ndarray, bits: int) -> int:
    """Codes in one int32, the first in the lowest bits."""
    total = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return total - (1 << 32) if total >= 1 << 31 else total


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes -> rows of int32, short rows filled with 0."""
    each = 32 // bits
    short = -codes.shape[1] % each
    codes = np.pad(codes, ((0, 0), (0, short)))
    return np.asarray(
        [[word(row[i : i + each], bits) for i in range(0, len(row), each)] for row in codes], np.int32
    )


def by_group(array: np.ndarray, group: int = GROUP) -> np.ndarray:
    """`[out, groups]` -> `[out, in]`."""
    return np.repeat(array, group, axis=1)


def compressed(bits: int, form: str, strategy: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy} | weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def int_quantized(name, rng, shape):
    """neuralmagic/compressed-tensors, compressors/quantized_compressors/naive_quantized.py: int8 and [out, 1]."""
    codes, scales = rng.integers(-128, 128, shape), scales_of(rng, (shape[0], 1)).astype(np.float32) / 20
    return {f"{name}.weight": codes.astype(np.int8), f"{name}.weight_scale": scales}, codes * scales


def pack_quantized(bits: int, *, groups: bool, zeros: bool = False, ordered: bool = False) -> Writer:
    """neuralmagic/compressed-tensors, compressors/quantized_compressors/pack_quantized.py: codes and zero points
    plus half their number, eight or four to an int32 along the inputs (codes) and the outputs (zero points)."""

    def writer(name, rng, shape):
        half, count = 2 ** (bits - 1), shape[1] // GROUP if groups else 1
        codes = rng.integers(-half, half, shape)
        scales = scales_of(rng, (shape[0], count)).astype(np.float32) / 2 ** (bits - 4)
        zero = rng.integers(-half, half, (shape[0], count)) if zeros else np.zeros((shape[0], count), int)
        index = np.repeat(np.arange(count), shape[1] // count)
        if ordered:
            index = rng.permutation(index)
        stored = {
            f"{name}.weight_packed": words(codes + half, bits),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": np.asarray(shape, np.int64),
        }
        if zeros:
            stored[f"{name}.weight_zero_point"] = words((zero + half).T, bits).T
        if ordered:
            stored[f"{name}.weight_g_idx"] = index.astype(np.int32)
        return stored, (codes - zero[:, index]) * scales[:, index]

    return writer


def float_quantized(per: str) -> Writer:
    """neuralmagic/compressed-tensors, compressors/quantized_compressors/float_quantized.py: float8 and [out, 1] or
    [1]; a fixed scale of the inputs beside."""

    def writer(name, rng, shape):
        codes = rng.normal(size=shape).astype(jnp.float8_e4m3fn)
        scales = scales_of(rng, (shape[0], 1) if per == "channel" else (1,)).astype(np.float32) * 4
        stored = {f"{name}.weight_scale": scales, f"{name}.input_scale": np.ones(1, np.float32)}
        return stored | {f"{name}.weight": codes}, codes.astype(np.float32) * scales

    return writer


def awq(name, rng, shape):
    """casper-hansen/AutoAWQ, awq/modules/linear/gemm.py (from_linear): eight columns to an int32, of which bit
    4 i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    codes, zeros = rng.integers(0, 16, shape), rng.integers(0, 16, (shape[0], shape[1] // GROUP))
    scales = scales_of(rng, zeros.shape)

    def packed(rows: np.ndarray) -> np.ndarray:  # [K, N] -> [K, N / 8]
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return np.asarray([[word(r[c : c + 8][order], 4) for c in range(0, len(r), 8)] for r in rows], np.int32)

    stored = {f"{name}.qweight": packed(codes.T), f"{name}.qzeros": packed(zeros.T), f"{name}.scales": scales.T}
    return stored, (codes - by_group(zeros)) * by_group(scales.astype(np.float32))


def gptq(
    bits: int, *, v2: bool = False, symmetric: bool = True, ordered: bool = False, index: bool = True
) -> Writer:
    """ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear/__init__.py (pack): codes of a column, row after row, in
    int32 along the inputs; zero points along the outputs, off whose words a word of ones is taken unless
    checkpoint_format is gptq_v2 (utils/model.py, convert_gptq_v2_to_v1_format)."""

    def writer(name, rng, shape):
        count = shape[1] // GROUP
        codes = rng.integers(0, 2**bits, shape)
        zeros = rng.integers(0, 2**bits, (shape[0], count))
        if symmetric:
            zeros[:] = 2 ** (bits - 1)
        scales = scales_of(rng, zeros.shape) / np.float16(2 ** (bits - 4) if bits > 4 else 1)
        groups = np.repeat(np.arange(count), GROUP)
        if ordered:
            groups = rng.permutation(groups)
        packed = words(zeros.T, bits).view(np.uint32)
        if not v2:
            packed = packed - np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])
        stored = {
            f"{name}.qweight": words(codes, bits).T,
            f"{name}.qzeros": packed.view(np.int32),
            f"{name}.scales": scales.T,
        }
        if index:
            stored[f"{name}.g_idx"] = groups.astype(np.int32)
        return stored, (codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]

    return writer


def bnb_int8(name, rng, shape):
    """bitsandbytes-foundation/bitsandbytes, nn/modules.py (Linear8bitLt) and functional.py (int8_vectorwise_quant):
    w = q SCB / 127."""
    codes, scales = rng.integers(-127, 128, shape), rng.uniform(0.1, 0.5, shape[0]).astype(np.float32)
    stored = {
        f"{name}.weight": codes.astype(np.int8),
        f"{name}.SCB": scales,
        f"{name}.weight_format": np.asarray(0, np.uint8),
    }
    return stored, codes * (scales[:, None] / np.float32(127))


def bnb_nf4(*, nested: bool) -> Writer:
    """bitsandbytes-foundation/bitsandbytes, functional.py (QuantState.as_dict, quantize_4bit): two codes a
    byte of the flattened matrix, the first in the high bits; a scale for 64, perhaps itself a code of a table."""

    def writer(name, rng, shape):
        table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        codes = rng.integers(0, 16, shape)
        flat = codes.reshape(-1)
        packed = np.asarray([(int(a) << 4) | int(b) for a, b in zip(flat[::2], flat[1::2], strict=True)], np.uint8)
        blocks = flat.size // 64
        absmax = rng.uniform(0.1, 0.4, blocks).astype(np.float32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
        stored = {f"{name}.weight": packed[:, None], f"{name}.weight.quant_map": table}
        if nested:
            index = rng.integers(0, 256, blocks).astype(np.uint8)
            of_codes = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            of_blocks = rng.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
            absmax = of_codes[index] * of_blocks[np.arange(blocks) // 256] + np.float32(0.25)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            stored |= {f"{name}.weight.nested_absmax": of_blocks, f"{name}.weight.nested_quant_map": of_codes}
            stored[f"{name}.weight.absmax"] = index
        else:
            stored[f"{name}.weight.absmax"] = absmax
        said = np.frombuffer(json.dumps(state).encode(), np.uint8)
        stored[f"{name}.weight.quant_state.bitsandbytes__nf4"] = said
        return stored, (table[flat] * np.repeat(absmax, 64)).reshape(shape)

    return writer


INPUTS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
BITS4 = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
FLOAT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES: dict[str, tuple[dict[str, Any], Writer, str]] = {
    "compressed int8 w8a16": (compressed(8, "pack-quantized", "channel"), pack_quantized(8, groups=False), "int8"),
    "compressed int4": (
        compressed(4, "pack-quantized", "group", group_size=GROUP),
        pack_quantized(4, groups=True),
        "int4",
    ),
    "compressed int4 with zeros": (
        compressed(4, "pack-quantized", "group", group_size=GROUP, symmetric=False),
        pack_quantized(4, groups=True, zeros=True),
        "int4",
    ),
    "compressed int4 in an order": (
        compressed(4, "pack-quantized", "group", group_size=GROUP, actorder="group"),
        pack_quantized(4, groups=True, ordered=True),
        "int4",
    ),
    "compressed fp8 by channel": (
        compressed(8, "float-quantized", "channel", dict(INPUTS, type="float"), type="float"),
        float_quantized("channel"),
        "float8_e4m3fn",
    ),
    "compressed fp8 by tensor": (
        compressed(8, "float-quantized", "tensor", dict(INPUTS, type="float", dynamic=False), type="float"),
        float_quantized("tensor"),
        "float8_e4m3fn",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        awq,
        "int4",
    ),
    "gptq": (BITS4, gptq(4), "int4"),
    "gptq without g_idx": (BITS4, gptq(4, index=False), "int4"),
    "gptq with zeros": (BITS4 | {"sym": False}, gptq(4, symmetric=False), "int4"),
    "gptq v2": (
        BITS4 | {"sym": False, "checkpoint_format": "gptq_v2"},
        gptq(4, v2=True, symmetric=False),
        "int4",
    ),
    "gptq in an order": (
        BITS4 | {"sym": False, "desc_act": True},
        gptq(4, symmetric=False, ordered=True),
        "int4",
    ),
    "gptq of 8 bits": (BITS4 | {"bits": 8}, gptq(8), "int8"),
    "gptq of 2 bits": (BITS4 | {"bits": 2}, gptq(2), "int2"),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8, "int8"),
    "bitsandbytes nf4": (FLOAT, bnb_nf4(nested=False), "uint4"),
    "bitsandbytes nf4, nested": (FLOAT | {"bnb_4bit_use_double_quant": True}, bnb_nf4(nested=True), "uint4"),
}


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


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def mxfp4(golden: Callable[..., Path]) -> tuple[Path, Path]:
    """openai/gpt-oss, gpt_oss/torch/weights.py: 32 codes of 4 bits in 16 bytes along the inputs, the first in
    the low bits; a power of two for them, plus 127."""
    rng, plain = np.random.default_rng(1), golden("gpt_oss")
    narrow = plain.with_name("narrow")
    config, tensors = json.loads((plain / "config.json").read_text()), load_file(plain / "model.safetensors")
    config["intermediate_size"] = width = 64
    for name in [n for n in tensors if n.endswith("gate_up_proj_bias")]:
        tensors[name] = rng.normal(size=(len(tensors[name]), 2 * width)).astype(np.float32)
    (plain / "config.json").write_text(json.dumps(config))
    stored = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, columns = tensors[name].shape
        inner, columns = (inner, 2 * width) if "gate_up" in name else (width, columns)
        codes = rng.integers(0, 16, (experts, columns, inner // 32, 32))
        exponents = rng.integers(120, 126, codes.shape[:-1])
        stored[f"{name}_blocks"] = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
        stored[f"{name}_scales"] = exponents.astype(np.uint8)
        del stored[name]
        wide = np.asarray(E2M1, np.float32)[codes] * np.exp2(exponents - 127.0)[..., None]
        tensors[name] = wide.reshape(experts, columns, inner).swapaxes(1, 2).astype(np.float32)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, plain / "model.safetensors")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write(narrow, config, stored), plain


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
