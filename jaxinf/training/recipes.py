"""The two embedded models: their architecture and how they are trained, as data."""

from __future__ import annotations

from dataclasses import dataclass

from jaxinf.layers.attention import AttentionSpec, QKNormSpec
from jaxinf.layers.block import LayerSpec
from jaxinf.layers.ffn import FFNSpec
from jaxinf.layers.moe import MoESpec, TokenChoice
from jaxinf.layers.rope import RopeSpec
from jaxinf.models import ModelSpec
from jaxinf.models.spec import fold
from jaxinf.training.loop import TrainSpec
from jaxinf.training.optimizer import OptimizerSpec
from jaxinf.training.tokenizer import VOCABULARY

CONTEXT = 1024


@dataclass(frozen=True)
class Recipe:
    """One embedded model."""

    name: str
    model: ModelSpec
    train: TrainSpec


def _attention(heads: int, kv_heads: int, head_dim: int, window: int | None) -> AttentionSpec:
    # Query and key norms keep attention scores bounded under Muon.
    return AttentionSpec(heads, kv_heads, head_dim, rope=RopeSpec(head_dim), window=window, qk_norm=QKNormSpec())


def _target() -> ModelSpec:
    dense, mixture = FFNSpec(512), MoESpec(8, 256, TokenChoice(top_k=2))
    windows = (128, None, 128, None, 128, None)
    parts = (dense, dense, mixture, dense, dense, mixture)
    layers = [LayerSpec(_attention(4, 2, 64, w), part) for w, part in zip(windows, parts, strict=True)]
    return ModelSpec(VOCABULARY, 256, fold(layers), CONTEXT, tied=True)


def _draft() -> ModelSpec:
    layers = [LayerSpec(_attention(4, 1, 32, w), FFNSpec(256)) for w in (128, None)]
    return ModelSpec(VOCABULARY, 128, fold(layers), CONTEXT, tied=True)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "stdlib",
            _target(),
            TrainSpec(
                batch=8, context=CONTEXT, steps=841, phases=((0.8, 512),), optimizer=OptimizerSpec(0.02, 0.004)
            ),
        ),
        Recipe(
            "stdlib-draft",
            _draft(),
            TrainSpec(
                batch=8, context=CONTEXT, steps=898, phases=((0.8, 512),), optimizer=OptimizerSpec(0.02, 0.006)
            ),
        ),
    )
}
