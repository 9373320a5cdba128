"""A generation loop compiled for TPUs that are not here: caches are written in place and never copied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_compiler import compiles

from jaxinf.aot import lower
from pallas_kernels import cache_append, flash_decode

pytestmark = compiles
LAYERS, SHARE = 16, 4


def generate(q, caches, starts, steps, ring):
    """`steps` passes through LAYERS layers of attention, rows at different positions, the caches in the carry."""
    tokens = q.shape[2]

    def layer(state, index):
        x, caches, starts = state
        new = x[:, ::SHARE]
        if isinstance(caches[0], tuple):
            caches = tuple(cache_append(c, new, index, starts, ring=ring, scales=scales) for c, scales in caches)
            (k, k_scale), (v, v_scale) = caches
            scales = dict(k_scale=k_scale, v_scale=v_scale)
        else:
            k, v = caches = tuple(cache_append(c, new, index, starts, ring=ring) for c in caches)
            scales = {}
        out = flash_decode(x, k, v, starts + tokens, layer=index, ring=ring, **scales)
        return (x + out, caches, starts), None

    def body(state):
        n, state = state
        (x, caches, starts), _ = jax.lax.scan(layer, state, jnp.arange(LAYERS))
        return n + 1, (x, caches, starts + tokens)

    start = (jnp.int32(0), (q, caches, starts))
    return jax.lax.while_loop(lambda state: state[0] < steps, body, start)[1][:2]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("batch", "heads", "slots", "dim", "tokens", "dtype", "ring"),
    [
        (4, 8, 8192, 128, 1, "bfloat16", False),
        (32, 1, 8192, 128, 5, "bfloat16", False),
        (4, 8, 16384, 64, 1, "bfloat16", False),
        (64, 1, 8192, 64, 1, "bfloat16", True),
        (8, 8, 8192, 128, 1, "int8", False),
    ],
)
def test_nothing_is_copied(chip, batch, heads, slots, dim, tokens, dtype, ring):
    """2 GiB of cache, and less than a thousandth of that in temporaries: no copy of a layer, nor a new layout."""
    cache = jax.ShapeDtypeStruct((LAYERS, batch, heads, slots, dim), dtype)
    stored = (cache, jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)) if dtype == "int8" else cache
    compiled = lower(
        lambda *args: generate(*args, ring),
        jax.ShapeDtypeStruct((batch, SHARE * heads, tokens, dim), jnp.bfloat16),
        (stored, stored),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        chip=chip,
        donate=(1,),
    )
    size = sum(2 * np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(stored))
    assert size >= 2**31
    assert compiled.memory.aliases >= size
    assert compiled.memory.temporaries < size / 1000
    layer = cache.size // LAYERS
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|copy-start)\(", compiled.executable.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < layer / 8 for shape in copies)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_that_fits_vmem_stays_in_hbm(chip: str, dtype: str) -> None:
    """32 MiB of all layers, which XLA would move to VMEM and back around every layer's append."""
    cache = jax.ShapeDtypeStruct((LAYERS, 1, 8, 1024, 128), dtype)
    stored = (cache, jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)) if dtype == "int8" else cache
    compiled = lower(
        lambda *args: generate(*args, False),
        jax.ShapeDtypeStruct((1, SHARE * 8, 1, 128), jnp.bfloat16),
        (stored, stored),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        chip=chip,
        donate=(1,),
    )
    moves = [line for line in compiled.text.splitlines() if re.search(r"\b(copy|copy-start|slice-start)\(", line)]
    moved = [
        np.prod([int(n) for n in dims.split(",")]) for line in moves for dims in re.findall(r"\[([\d,]+)\]", line)
    ]
    assert max(moved, default=0) < cache.size // LAYERS


@pytest.mark.parametrize("donated", [False, True])
def test_an_append_whose_result_nothing_reads(donated: bool) -> None:
    cache = jax.ShapeDtypeStruct((2, 1, 8, 1024, 128), jnp.bfloat16)
    new, starts = jax.ShapeDtypeStruct((1, 8, 1, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = lower(
        lambda cache, new, starts: cache_append(cache, new, 0, starts),
        *(cache, new, starts),
        chip="v6e",
        donate=(0,) if donated else (),
    )
    assert (compiled.memory.aliases > 0) == donated
