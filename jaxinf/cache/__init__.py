"""Caches of keys and values: one call, `step`, stores new tokens and attends to old and new."""

from jaxinf.cache.base import AttentionRule, LayerCache, Step
from jaxinf.cache.choice import kv_placement, layer_cache
from jaxinf.cache.dense import DenseCache
from jaxinf.cache.grouped import Grouped
from jaxinf.cache.kinds import KINDS, Kind, check_kind, row_bytes, slot_bytes
from jaxinf.cache.model_cache import Cache
from jaxinf.cache.rolling import RollingCache, SinkCache
from jaxinf.cache.scaled import Scaled
from jaxinf.cache.sharded import BatchSharded, SequenceSharded
from jaxinf.cache.store import Floats, Store

__all__ = [
    "KINDS",
    "AttentionRule",
    "BatchSharded",
    "Cache",
    "DenseCache",
    "Floats",
    "Grouped",
    "Kind",
    "LayerCache",
    "RollingCache",
    "Scaled",
    "SequenceSharded",
    "SinkCache",
    "Step",
    "Store",
    "check_kind",
    "kv_placement",
    "layer_cache",
    "row_bytes",
    "slot_bytes",
]
