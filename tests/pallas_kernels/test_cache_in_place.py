"""Appending and attending in a jitted generation loop: the cache is written in place, and the answer is right."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cache_append, flash_attention, flash_decode
from pallas_kernels.stored import encode, storage_dtype

BATCH, KV_HEADS, HEADS, DIM, TOKENS = 4, 2, 4, 32, 2


def layer(x, weight, caches, index, starts, ring=False, window=None):
    """One attention layer without projections out: x [B, T, N * D] -> the same, and the caches."""
    tokens = x.shape[1]
    heads = (x @ weight).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
    new = jnp.tanh(heads[:, :KV_HEADS]), heads[:, KV_HEADS : 2 * KV_HEADS]
    k, v = (cache_append(cache, part, index, starts, ring=ring) for cache, part in zip(caches, new, strict=True))
    out = flash_decode(heads, k, v, starts + tokens, layer=index, ring=ring, window=window)
    return x + out.swapaxes(1, 2).reshape(x.shape), (k, v)


def step(x, weights, caches, starts, scanned, **rule):
    if not scanned:
        for index in range(len(weights)):
            x, caches = layer(x, weights[index], caches, index, starts, **rule)
        return x, caches

    def body(carry, this):
        x, caches = carry
        return layer(x, this[0], caches, this[1], starts, **rule), None

    (x, caches), _ = jax.lax.scan(body, (x, caches), (weights, jnp.arange(len(weights))))
    return x, caches


@functools.partial(jax.jit, static_argnames=("scanned", "ring", "window"), donate_argnames="caches")
def generate(x, weights, caches, starts, steps, *, scanned, ring=False, window=None):
    def body(state):
        n, x, caches, starts = state
        x, caches = step(x, weights, caches, starts, scanned, ring=ring, window=window)
        return n + 1, x, caches, starts + x.shape[1]

    return jax.lax.while_loop(lambda state: state[0] < steps, body, (0, x, caches, starts))[1:3]


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("dtype", "ring"), [("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)]
)
def test_no_cache_is_copied(dtype, ring, scanned):
    """Temporaries of the compiled loop, rows at different positions, stay below a tenth of the cache."""
    layers, slots = 4, 4096
    stored = storage_dtype(dtype, "cpu")
    cache = jax.ShapeDtypeStruct((layers, BATCH, KV_HEADS, slots, DIM), stored)
    width = HEADS * DIM
    compiled = generate.lower(
        jax.ShapeDtypeStruct((BATCH, TOKENS, width), dtype),
        jax.ShapeDtypeStruct((layers, width, width), dtype),
        (cache, cache),
        jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        scanned=scanned,
        ring=ring,
        window=slots - TOKENS if ring else None,
    ).compile()
    size = 2 * cache.size * stored.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("ring", [False, True], ids=["dense", "ring"])
def test_one_row_in_one_block_is_not_copied_either(tokens: int, dtype: str, ring: bool) -> None:
    """Layers apart, each read in one block: no loop keeps the update out of what reads the cache."""
    layers, slots, width = 3, 256, HEADS * 64
    stored = storage_dtype(dtype, "cpu")
    cache = jax.ShapeDtypeStruct((1, 1, KV_HEADS, slots, 64), stored)
    x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    rule = dict(ring=ring, window=slots - tokens if ring else None)

    def run(x, weights, caches, starts, steps):
        def body(state):
            n, x, caches, starts = state
            after = []
            for weight, pair in zip(weights, caches, strict=True):
                x, pair = layer(x, weight, pair, 0, starts, **rule)
                after.append(pair)
            return n + 1, x, after, starts + tokens

        return jax.lax.while_loop(lambda state: state[0] < steps, body, (0, x, caches, starts))[1:3]

    compiled = (
        jax.jit(run, donate_argnums=2)
        .lower(
            x,
            [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers,
            [(cache, cache)] * layers,
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        # Not at the level that the other tests compile with, where XLA does not try to write in place.
        .compile(compiler_options={"xla_backend_optimization_level": 2})
    )
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert not [shape for shape in copies if np.prod([int(n) for n in shape.split(",")]) >= cache.size]


@pytest.mark.parametrize(
    ("stored", "ring", "scanned"), [("float32", False, True), ("float32", True, False), ("uint16", True, True)]
)
def test_steps_equal_the_whole(stored, ring, scanned):
    """Feeding a sequence a few tokens at a time gives what attention over the whole gives, ragged starts or not."""
    random = np.random.default_rng(0)
    layers, total, window, slots = 2, 10, 4, 4 + TOKENS - 1 if ring else 16
    weights = jnp.asarray(random.normal(size=(layers, HEADS * 8, HEADS * 8)) / 4, jnp.float32)
    x = jnp.asarray(random.normal(size=(2, total, HEADS * 8)), jnp.float32)

    whole = x
    for weight in weights:
        heads = (whole @ weight).reshape(2, total, HEADS, 8).swapaxes(1, 2)
        k, v = jnp.tanh(heads[:, :KV_HEADS]), heads[:, KV_HEADS : 2 * KV_HEADS]
        if stored == "uint16":
            k, v = (part.astype(jnp.bfloat16).astype(jnp.float32) for part in (k, v))
        out = flash_attention(heads, k, v, window=window, implementation="reference")
        whole += out.swapaxes(1, 2).reshape(x.shape)

    caches = tuple(encode(jnp.zeros((layers, 2, KV_HEADS, slots, 8)), stored) for _ in range(2))
    run = jax.jit(functools.partial(step, scanned=scanned, ring=ring, window=window))
    # Row 1 begins two tokens later: its first chunk is another's leftovers, which it then writes over.
    parts = [[], []]
    for begin in range(0, total + 2, TOKENS):
        starts = np.array([min(begin, total - TOKENS), max(begin - 2, 0)])
        chunk = jnp.stack([x[b, start : start + TOKENS] for b, start in enumerate(starts)])
        out, caches = run(chunk, weights, caches, jnp.asarray(starts))
        for b, start in enumerate(starts):
            parts[b] = parts[b][:start] + list(out[b])
    np.testing.assert_allclose(np.array(parts), whole, atol=1e-5 if stored == "float32" else 2e-2)
