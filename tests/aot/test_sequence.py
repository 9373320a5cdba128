"""Programs over a `sequence` axis, and caches that several chips hold, compiled for chips that are not here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_compiler import compiles

from jaxinf.aot import lowering, programs, topology
from jaxinf.models import presets
from sharding.collectives import AXES
from sharding.ring import ring_attention
from sharding.ulysses import ulysses_attention

pytestmark = compiles
SLICE, CHIPS, TOKENS = "v5e:2x4", 8, P(None, None, "sequence")


def shallow(name: str, layers: int = 2, **attention):
    """A published model's widths, with few layers and a small vocabulary."""
    spec = presets.preset(name)
    (segment,) = spec.segments
    period = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **attention))
        for layer in segment.period
    )
    return dataclasses.replace(
        spec, vocab=4096, segments=(dataclasses.replace(segment, period=period, repeats=layers),)
    )


def attention(form, local: int, heads=8, kv_heads=2, **mask) -> lowering.Compiled:
    where = topology.mesh(SLICE, (1, 1, CHIPS, 1, 1), AXES)

    def array(heads):
        split = NamedSharding(where, TOKENS)
        return jax.ShapeDtypeStruct((1, heads, local * CHIPS, 128), jnp.bfloat16, sharding=split)

    run = jax.shard_map(
        lambda q, k, v: form(q, k, v, **mask), mesh=where, in_specs=(TOKENS,) * 3, out_specs=TOKENS, check_vma=False
    )
    shapes = array(heads), array(kv_heads), array(kv_heads)
    return lowering.lower(run, *shapes, chip=SLICE, mesh=where)


def test_the_ring_travels_behind_the_products() -> None:
    """Transfers start before the kernels of their step and are awaited after, and nothing else is sent."""
    compiled = attention(ring_attention, 2048)
    own = 2 * 2 * 2048 * 128 * 2  # k and v, heads, tokens, channels, bfloat16
    assert {c.kind for c in compiled.collectives} == {"collective-permute"}
    assert sum(c.bytes * c.times for c in compiled.collectives) == (CHIPS - 1) * own

    steps = 0
    for body in re.split(r"\n(?=\S)", compiled.text):
        order = re.findall(r"= .*? (collective-permute-start|collective-permute-done|custom-call)\(", body)
        kernels = [at for at, op in enumerate(order) if op == "custom-call"]
        if kernels and "collective-permute-start" in order:
            steps += 1
            first, last = order.index("collective-permute-start"), order.index("collective-permute-done")
            assert any(first < at < last for at in kernels)
    assert steps == 2  # what a chip has itself, and the loop


def test_a_short_window_sends_to_neighbours_alone() -> None:
    compiled = attention(ring_attention, 2048, window=1000)
    assert sum(c.bytes * c.times for c in compiled.collectives) == 2 * 2 * 2048 * 128 * 2


def test_ulysses() -> None:
    """Queries, keys and values there, results back; key heads go to each chip that needs them."""
    compiled = attention(ulysses_attention, 1024)
    assert {c.kind for c in compiled.collectives} == {"all-to-all"}
    heads = 8 + 2 * 8 + 8  # two key heads, each needed by four chips
    assert sum(c.bytes * c.times for c in compiled.collectives) == heads * 1024 * 128 * 2


CASES = {
    "sequence=8": dict(batch=4),
    "sequence=2,tensor=4": dict(batch=4),
    "tensor=8": dict(batch=16),  # two key heads: rows over groups of four
    "tensor=8 ": dict(batch=1, capacity=262144),  # tokens over groups of four
}


@pytest.mark.parametrize("name", CASES)
def test_no_cache_is_copied(name: str) -> None:
    """The whole loop, ragged rows; prompts short, so that activations stay small beside the cache."""
    spec = shallow("llama-3.1-8b", kv_heads=2 if name.startswith("tensor") else 8)
    options = dict(prompt=256, new_tokens=16, capacity=65536) | CASES[name]
    program = programs.generation(spec, chip=SLICE, mesh=name.strip(), **options)
    assert program.compiled.memory.aliases >= program.cache
    assert program.temporaries < 0.1


@pytest.mark.slow
def test_a_long_prefill_holds_a_share_of_its_activations() -> None:
    """128k tokens of Llama 8B's widths: on eight chips each holds at most a sixth of what one would."""
    spec, options = shallow("llama-3.1-8b"), dict(part="prefill", batch=1, prompt=131072, new_tokens=1)
    one = programs.generation(spec, chip="v5e", **options)
    each = programs.generation(spec, chip=SLICE, mesh="sequence=8", **options)
    assert each.cache * CHIPS <= one.cache * 1.01
    assert each.compiled.memory.temporaries * 6 <= one.compiled.memory.temporaries
