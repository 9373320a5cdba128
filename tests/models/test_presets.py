"""Presets have the sizes that were published, and sizes follow from specs alone."""

import jax
import pytest
from flax import nnx

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, fold
from jaxinf.models.describe import describe
from jaxinf.models.presets import names, preset
from pallas_kernels.errors import InputError

# Parameters that the model cards and the checkpoints' metadata state.
PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "olmoe-1b-7b": 6_919_161_856,
    "phi-3-mini": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "smollm2-135m": 134_515_008,
}
# Stated in billions alone; those of Gemma 3 that see images count their vision tower, 0.42, too.
ROUNDED = {
    "gemma-3-4b": 4.30 - 0.42,
    "gemma-3-12b": 12.19 - 0.42,
    "gemma-3-27b": 27.43 - 0.42,
    "olmo2-7b": 7.30,
    "qwen3-0.6b": 0.6,
}
# GPT-OSS does not count its embedding among the active ones.
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.0,
    "olmoe-1b-7b": 1.3,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22.0,
    "gpt-oss-20b": 3.61 + 0.58,
    "gpt-oss-120b": 5.13 + 0.58,
}


def test_every_preset_is_checked() -> None:
    assert set(names()) == set(PUBLISHED) | set(ROUNDED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_published(name: str) -> None:
    assert describe(preset(name)).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_parameters_are_those_published_in_billions(name: str) -> None:
    assert describe(preset(name)).parameters == pytest.approx(ROUNDED[name] * 1e9, abs=1.1e7)


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_active_parameters_are_those_published(name: str) -> None:
    assert describe(preset(name)).active_parameters == pytest.approx(ACTIVE[name] * 1e9, rel=0.02)


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"'llama-9' does not exist; there are .*llama-3\.1-8b.*qwen3-8b"):
        preset("llama-9")


def test_sizes_are_those_of_the_arrays() -> None:
    wide = AttentionSpec(4, 2, 8, rope=RopeSpec(8))
    local = AttentionSpec(4, 1, 8, rope=RopeSpec(8), window=6)
    layers = [LayerSpec(local, FFNSpec(24)), LayerSpec(wide, MoESpec(5, 12, TokenChoice(top_k=2)))] * 3
    spec = ModelSpec(40, 16, fold(layers), 64)
    found = describe(spec, dtype="bfloat16", cache_dtype="float32")

    model = CausalLM(spec, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model))
    assert found.parameters == sum(leaf.size for leaf in leaves)
    assert found.bytes == 2 * found.parameters
    # Three of five experts rest in each of three layers; each has up, gate and down.
    assert found.parameters - found.active_parameters == 3 * 3 * 3 * 16 * 12
    one, two = (model.init_cache(1, n, dtype="float32").nbytes for n in (20, 21))
    assert found.kv_bytes_per_token == two - one
    assert found.kv_bytes_of_windows == one - 20 * found.kv_bytes_per_token
