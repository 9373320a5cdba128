"""Writers of quantised checkpoints in the layouts that other projects publish, code by code.

They follow the words and shifts of the layouts, none of the readers' code; each names its source.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

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
