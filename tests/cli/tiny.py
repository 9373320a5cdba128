"""The tiny model that the commands run on."""

from pathlib import Path

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import ModelSpec, fold

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizers" / "byte_level"
VOCAB, CONTEXT = 384, 64


def tiny_spec() -> ModelSpec:
    """A sliding layer of 8 tokens and a full one."""
    layers = [
        LayerSpec(AttentionSpec(2, 1, 8, rope=RopeSpec(8), window=window), FFNSpec(24)) for window in (8, None)
    ]
    return ModelSpec(VOCAB, 16, fold(layers), CONTEXT)
