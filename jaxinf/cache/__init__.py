"""Caches of keys and values: one call, `step`, stores new tokens and attends to old and new."""

from jaxinf.cache.base import AttentionRule, LayerCache, Step
from jaxinf.cache.choice import kv_placement, layer_cache
from jaxinf.cache.dense import DenseCache
from jaxinf.cache.model_cache import Cache
from jaxinf.cache.rolling import RollingCache, SinkCache
from jaxinf.cache.sharded import BatchSharded, SequenceSharded

__all__ = [
    "AttentionRule",
    "BatchSharded",
    "Cache",
    "DenseCache",
    "LayerCache",
    "RollingCache",
    "SequenceSharded",
    "SinkCache",
    "Step",
    "kv_placement",
    "layer_cache",
]
