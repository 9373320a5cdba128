"""Layers, each a frozen spec (what it is) and an nnx module (its parameters and maths)."""

from jaxinf.layers.attention import AlibiSpec, Attention, AttentionSpec, QKNormSpec
from jaxinf.layers.block import Block, LayerSpec
from jaxinf.layers.ffn import FFN, ClampedGated, FFNSpec, Gated, Plain
from jaxinf.layers.linear import Embedding, Linear
from jaxinf.layers.moe import ExpertChoice, MoE, MoESpec, TokenChoice
from jaxinf.layers.norm import LayerNormSpec, NormSpec, RMSNormSpec
from jaxinf.layers.rope import (
    DynamicNTKRopeSpec,
    LinearRopeSpec,
    Llama3RopeSpec,
    LongRopeSpec,
    RopeSpec,
    YarnRopeSpec,
)

__all__ = [
    "FFN",
    "AlibiSpec",
    "Attention",
    "AttentionSpec",
    "Block",
    "ClampedGated",
    "DynamicNTKRopeSpec",
    "Embedding",
    "ExpertChoice",
    "FFNSpec",
    "Gated",
    "LayerNormSpec",
    "LayerSpec",
    "Linear",
    "LinearRopeSpec",
    "Llama3RopeSpec",
    "LongRopeSpec",
    "MoE",
    "MoESpec",
    "NormSpec",
    "Plain",
    "QKNormSpec",
    "RMSNormSpec",
    "RopeSpec",
    "TokenChoice",
    "YarnRopeSpec",
]
