"""Caches of keys and values: one call, `step`, stores new tokens and attends to old and new."""

from jaxinf.cache.base import AttentionRule, LayerCache, Step
from jaxinf.cache.dense import DenseCache
from jaxinf.cache.model_cache import Cache
from jaxinf.cache.rolling import RollingCache, SinkCache

__all__ = ["AttentionRule", "Cache", "DenseCache", "LayerCache", "RollingCache", "SinkCache", "Step"]
