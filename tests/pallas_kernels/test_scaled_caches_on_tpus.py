"""Appending to caches of int8 and float8 with scales and reading them, compiled for every chip."""

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import compiles

from jaxinf.aot import lower
from pallas_kernels import cache_append, flash_decode

pytestmark = compiles
CHIPS = ("v5e", "v6e", "v5p", "7x")
SLOW = pytest.mark.slow
# Key heads of a chip, head_dim, tokens.
SHAPES = [(8, 128, 1), *(pytest.param(*shape, marks=SLOW) for shape in ((8, 64, 1), (1, 128, 5), (2, 80, 16)))]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [pytest.param("int8", marks=SLOW), "float8_e4m3fn"])
@pytest.mark.parametrize(("heads", "dim", "tokens"), SHAPES)
def test_appended_and_read_as_they_are(chip: str, dtype: str, heads: int, dim: int, tokens: int) -> None:
    def step(q, k, v, k_scale, v_scale, starts):
        new = q[:, ::4]
        k, k_scale = cache_append(k, new, 1, starts, scales=k_scale)
        v, v_scale = cache_append(v, new, 1, starts, scales=v_scale)
        out = flash_decode(q, k, v, starts + tokens, layer=1, k_scale=k_scale, v_scale=v_scale)
        return out, k, v, k_scale, v_scale

    cache = jax.ShapeDtypeStruct((2, 4, heads, 2048, dim), dtype)
    scales = jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)
    q = jax.ShapeDtypeStruct((4, 4 * heads, tokens, dim), jnp.bfloat16)
    starts = jax.ShapeDtypeStruct((4,), jnp.int32)
    compiled = lower(step, q, cache, cache, scales, scales, starts, chip=chip, donate=(1, 2, 3, 4))
    size = 2 * (cache.size + 4 * scales.size)
    assert compiled.memory.aliases >= size
    assert compiled.memory.temporaries < size / 10
