"""How many slots a model's caches get."""

import jax
import pytest

from jaxinf.cache import DenseCache, RollingCache
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec
from jaxinf.models import ModelSpec, fold
from jaxinf.models.causal_lm import init_cache


def layers(**options):
    specs = [LayerSpec(AttentionSpec(2, 1, 8, window=w), FFNSpec(8)) for w in (5, None)]
    spec = ModelSpec(11, 8, fold(specs), 64)
    cache = jax.eval_shape(lambda: init_cache(spec, 2, 700, dtype="float32", **options))
    return [layer for segment in cache.layers for layer in segment]


def test_as_many_as_needed():
    window, whole = layers(max_append=3)
    assert isinstance(window, RollingCache)
    assert isinstance(whole, DenseCache)
    assert window.store.k.shape[-2] == 5 + 3 - 1
    assert whole.store.k.shape[-2] == 700


@pytest.mark.parametrize("max_append", [1, 124, 125])
def test_whole_tiles_for_a_tpu(monkeypatch, max_append):
    monkeypatch.setattr("pallas_kernels.chips.platform", lambda: "tpu")
    window, whole = layers(max_append=max_append)
    assert window.store.k.shape[-2] == (128 if max_append <= 124 else 256)
    assert window.append_limit >= max_append - 1
    assert whole.store.k.shape[-2] == 768
