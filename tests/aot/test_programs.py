"""Whole programs, prefill and the decode loop of published models, compiled for chips that are not here."""

import dataclasses

import pytest
from tpu_compiler import compiles

from jaxinf.aot import programs
from jaxinf.models import presets
from pallas_kernels.errors import InputError

pytestmark = compiles

# One chip of eight under tensor parallelism, but the last, which is whole. Pieces of a prompt are sized so that
# activations stay small beside the cache; a batch of long contexts makes the cache what memory is for.
SHARDS = [
    ("llama-3.1-8b", "v5e", dict(ways=8, batch=8, capacity=32768, piece=512)),
    ("llama-3.1-70b", "v6e", dict(ways=8, batch=4, capacity=32768, piece=512)),
    ("qwen3-8b", "v5e", dict(ways=8, batch=8, capacity=32768, piece=512)),
    ("qwen3-30b-a3b", "v6e", dict(ways=8, batch=8, capacity=32768, piece=128)),
    ("gemma-3-12b", "v5e", dict(ways=8, batch=8, capacity=32768, piece=256)),
    ("mixtral-8x7b", "v6e", dict(ways=8, batch=8, capacity=32768, piece=256)),
    ("gpt-oss-20b", "v6e", dict(ways=8, batch=32, capacity=32768, piece=32)),
    ("llama-3.2-1b", "v5p", dict(batch=32, capacity=16384, piece=256)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chip", "options"), SHARDS, ids=[name for name, *_ in SHARDS])
def test_generation_never_copies_the_cache(name, chip, options):
    program = programs.generation(name, chip=chip, prompt=1024, new_tokens=64, **options)
    assert program.compiled.memory.aliases >= program.cache  # written where it lies
    assert program.temporaries < 0.1
    assert program.compiled.memory.peak > program.weights + program.cache


def test_a_few_layers_of_a_shard():
    spec = programs.shard(presets.preset("llama-3.1-8b"), 8)
    spec = dataclasses.replace(spec, segments=(dataclasses.replace(spec.segments[0], repeats=4),), vocab=4096)
    program = programs.generation(spec, batch=4, prompt=256, new_tokens=16, capacity=32768, piece=128)
    assert program.compiled.memory.aliases >= program.cache
    assert program.temporaries < 0.1


def test_a_shard_holds_its_part_of_heads_and_widths():
    spec = programs.shard(presets.preset("llama-3.1-8b"), 8)
    layer = next(spec.layers())
    assert (layer.attention.heads, layer.attention.kv_heads, layer.ffn.width) == (4, 1, 1792)
    with pytest.raises(InputError, match="heads=32"):
        programs.shard(presets.preset("llama-3.1-8b"), 3)
