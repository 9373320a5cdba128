"""What is wrong with a checkpoint is said in one sentence that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxinf.checkpoint import convert, load, read_spec, save_orbax
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, fold
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError

Golden = Callable[..., Path]


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def retensor(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_is_no_checkpoint(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is no checkpoint"):
        load(tmp_path)
    folder = golden("llama")
    (folder / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json must hold a JSON object, not a list"):
        load(folder)


def test_bad_arguments(golden: Golden) -> None:
    folder = golden("llama")
    for dtype in ("int8", "float64", "fp16"):
        with pytest.raises(InputError, match=f"dtype='{dtype}' must be one of float32, bfloat16, float16"):
            load(folder, dtype=dtype)
    with pytest.raises(InputError, match='layout=\'loose\' must be "list" or "stacked"'):
        load(folder, layout="loose")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match='to=\'pickle\' must be "safetensors" or "orbax"'):
        convert(folder, folder.parent / "new", to="pickle")  # pyright: ignore[reportArgumentType]
    edit(folder, dtype="float8")
    with pytest.raises(CheckpointError, match="dtype='float8', where float32, bfloat16, float16 are known"):
        load(folder)
    assert load(folder, dtype="float32").model.dtype == jnp.float32


def test_an_unknown_family_names_those_that_exist(golden: Golden) -> None:
    folder = golden("llama")
    for kind in (["llama"], None, 3):
        with pytest.raises(UnsupportedError, match=r"model_type=.* is not supported; supported are"):
            load(edit(folder, model_type=kind))
    edit(folder, model_type="mamba")
    with pytest.raises(UnsupportedError, match=r"model_type='mamba' is not supported; .* bloom, .*qwen3"):
        load(folder)


@pytest.mark.parametrize(
    ("case", "changes", "complaint"),
    [
        ("llama", {"logit_bias": 2.0}, "not understood: logit_bias=2.0"),
        ("llama", {"qk_norm": True, "attention_sink": 4}, "not understood: qk_norm=True, attention_sink=4"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish' is not supported; supported are silu, "),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral' is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 1, 2]}},
            r"not understood: rope_parameters.mrope_section=\[1, 1, 2\]",
        ),
        ("qwen2", {"is_causal": False}, "not understood: is_causal=False"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "not understood: layer_types="),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "holds chunked_attention; supported are full"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types=.* must have 3 entries"),
        ("gemma2", {"sliding_window": None}, "must be a number of tokens: layers slide"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported; it must be False"),
        ("phi3_long", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "must have 8 entries"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale=0.5 is not supported; it must be absent"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln=True is not supported"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi=False is not supported"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type='rms_norm' is not supported"),
        ("cohere2", {"use_parallel_block": 0}, "use_parallel_block=0 is not supported; it must be True"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 must be 1, or 2 with new"),
        ("falcon_new", {"parallel_attn": False}, "describes no known model"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\] must have 3 entries"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be 'silu'"),
    ],
)
def test_keys_that_change_the_maths_are_refused_by_name(
    case: str, changes: dict[str, Any], complaint: str, golden: Golden
) -> None:
    folder = edit(golden(case), **changes)
    with pytest.raises((UnsupportedError, CheckpointError), match=complaint):
        load(folder)


def test_keys_that_change_nothing_pass(golden: Golden) -> None:
    folder = golden("llama")
    before = read_spec(folder)
    edit(folder, use_cache=False, task_specific_params={"a": 1}, new_feature=False, newer_feature=None)
    edit(folder, attention_dropout=0.3, _name_or_path="x", bos_token_id=[1])
    assert read_spec(folder) == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": "wide"}, "hidden_size='wide' must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be an integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"num_key_value_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size=32 is no multiple of num_attention_heads=5"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
    ],
)
def test_nonsense_in_a_config(changes: dict[str, Any], complaint: str, golden: Golden) -> None:
    folder = edit(golden("llama"), **changes)
    with pytest.raises((CheckpointError, UnsupportedError), match=complaint):
        load(folder)


@pytest.mark.parametrize("method", ["fp8", "hqq", None])
def test_unknown_ways_to_quantise_are_refused(method: str | None, golden: Golden) -> None:
    folder = edit(golden("gpt_oss"), quantization_config={"quant_method": method})
    with pytest.raises(
        UnsupportedError, match=f"stored as {method!r}, which is not read; awq, bitsandbytes, .* are"
    ):
        load(folder)
    edit(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="stored as 'mxfp4', but none is"):
        load(folder)
    with pytest.raises(CheckpointError, match="quantization_config='int8' must be an object"):
        load(edit(folder, quantization_config="int8"))


def test_integers_are_no_weights(golden: Golden) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = retensor(golden("llama"), lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} in int8, which is no form of plain weights"):
        load(folder)


def test_tensors_that_do_not_fit_are_all_named(golden: Golden) -> None:
    def change(t: dict[str, np.ndarray]) -> None:
        del t["model.norm.weight"], t["model.layers.1.self_attn.k_proj.weight"]
        t["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        t["model.layers.0.mlp.up_proj.weight"] = np.ones((32, 31), np.float32)
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # harmless

    folder = retensor(golden("llama"), change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"the tensors of {folder} do not fit its config; "
        "missing: model.layers.1.self_attn.k_proj.weight, model.norm.weight; "
        "not understood: model.layers.0.self_attn.q_norm.weight; "
        "of another shape or kind: model.layers.0.mlp.up_proj.weight [32, 31], where the parameter is [32, 32]"
    )


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_fused_tensors_of_another_size_are_named(case: str, name: str, golden: Golden) -> None:
    def longer(t: dict[str, np.ndarray]) -> None:
        for axis in (0, -1):
            t[name] = np.concatenate([t[name], t[name].take([0], axis)], axis)

    with pytest.raises(CheckpointError, match=f"of another shape or kind: {name} "):
        load(retensor(golden(case), longer))


def test_a_head_that_is_tied_may_be_stored_and_must_be_if_not(golden: Golden) -> None:
    def store(t: dict[str, np.ndarray]) -> None:
        t["lm_head.weight"] = t["model.embed_tokens.weight"]

    folder = retensor(golden("qwen3"), store)
    assert load(folder).model.head is None
    assert load(edit(folder, tie_word_embeddings=False)).model.head is not None
    folder = retensor(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", ["llama", "llama_bf16"])
@pytest.mark.parametrize("layout", ["list", "stacked"])
def test_values_that_are_no_numbers(value: float, case: str, layout: Any, golden: Golden) -> None:
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        folder = golden(case)
        if case == "llama":
            retensor(folder, lambda t, name=name: t[name].reshape(-1).__setitem__(-1, value))
        else:
            poke_bf16(folder / "model.safetensors", name, value)
        with pytest.raises(CheckpointError, match=f"tensor {name} holds values that are NaN or infinite"):
            load(folder, layout=layout)
        remove(folder)


def poke_bf16(path: Path, name: str, value: float) -> None:
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    end = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][1]
    raw[end - 2 : end] = np.asarray(value, jnp.bfloat16).tobytes()
    path.write_bytes(raw)


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_values_that_do_not_fit_the_dtype(golden: Golden) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = retensor(golden("llama"), lambda t: t[name].__setitem__((0, 0), 1e6))
    assert load(folder, dtype="bfloat16").model.dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match=f"{name} .* infinite in float16; .* needs a wider dtype"):
        load(folder, dtype="float16")


def test_files_that_are_cut_or_corrupt(golden: Golden) -> None:
    folder = golden("llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first = next(n for n in header if n != "__metadata__")

    def rewritten(**changes: Any) -> bytes:
        text = json.dumps(header | {first: header[first] | changes}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    damaged = {
        whole[:-1]: "so the file is truncated",
        whole[: 8 + length // 2]: "its header would take",
        whole[:5]: "its header would take",
        b"": "its header would take",
        whole[:8] + b"\xff" * length: "its header does not parse",
        b"\xff" * 8 + whole[8:]: "its header would take",
        rewritten(shape=[1, 2]): f"{first} of shape \\[1, 2\\] has",
        rewritten(data_offsets=[-4, 0]): "holds sizes that are no sizes",
        rewritten(data_offsets="here"): "its header does not parse",
        rewritten(dtype="F4"): f"{first} has dtype F4; known: F64, ",
    }
    for content, complaint in damaged.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=complaint):
            load(folder)


def test_an_index_that_lies(golden: Golden) -> None:
    folder = golden("llama3")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / max(index["weight_map"].values())
    shard.rename(folder / "aside")
    with pytest.raises(CheckpointError, match=f"names files that are not there: {shard.name};"):
        load(folder)
    (folder / "aside").rename(shard)
    places = index["weight_map"]
    for changed, complaint in (
        ({"weight_map": places | {"model.ghost": shard.name}}, r"do not hold: model\.ghost \(model-0000"),
        ({"weight_map": places | {"model.ghost": "../llama/model.safetensors"}}, "files outside its folder"),
        ({"weights": places}, "is not an index of tensors"),
        ({"weight_map": [1]}, "is not an index of tensors"),
        ([], "is not an index of tensors"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=complaint):
            load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"it holds model-00001-of-.*\.safetensors, .* but no index"):
        load(folder)


def test_pickles_are_never_read(golden: Golden) -> None:
    folder = golden("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model\.bin\).*safetensors\.torch"):
        load(folder)


def test_a_generation_config_that_does_not_parse(golden: Golden) -> None:
    folder = golden("llama")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read as JSON"):
        load(folder)


def test_orbax_folders_that_are_no_such_thing(tmp_path: Path) -> None:
    layer = LayerSpec(AttentionSpec(2, 1, 8, rope=RopeSpec(8)), FFNSpec(8))
    model = CausalLM(ModelSpec(16, 8, fold([layer]), 32), rngs=nnx.Rngs(0))
    save_orbax(tmp_path / "m", model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    edit(tmp_path / "m", weights="zarr")
    with pytest.raises(CheckpointError, match='weights=\'zarr\' must be "safetensors" or "orbax"'):
        load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "weights" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="weights holds no weights that orbax can read"):
        load(tmp_path / "m")


def test_an_orbax_entry_that_is_cut(tmp_path: Path) -> None:
    layer = LayerSpec(AttentionSpec(2, 1, 8, rope=RopeSpec(8)), FFNSpec(600))
    model = CausalLM(ModelSpec(600, 600, fold([layer]), 32), rngs=nnx.Rngs(0))
    save_orbax(tmp_path / "m", model)
    data = max((tmp_path / "m" / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"orbax cannot read [a-z]*\..* of .*weights: "):
        load(tmp_path / "m")
