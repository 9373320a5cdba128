"""Whole programs, prefill and the decode loop of published models, compiled for chips that are not here."""

import pytest
from tpu_compiler import compiles, few_layers

from jaxinf.aot import programs
from pallas_kernels.errors import InputError

pytestmark = compiles

# Eight chips under tensor parallelism, but the last, which has one. Pieces of prompts are sized so that activations
# stay small beside the cache; a batch of long contexts makes the cache what memory is for.
WHOLE = [
    ("llama-3.1-8b", "v5e:2x4", dict(mesh="tensor=8", batch=8, capacity=32768, piece=128)),
    ("llama-3.1-70b", "v6e:2x4", dict(mesh="tensor=8", batch=4, capacity=32768, piece=256)),
    ("qwen3-8b", "v5e:2x4", dict(mesh="tensor=8", batch=8, capacity=32768, piece=128)),
    ("qwen3-30b-a3b", "v6e:2x4", dict(mesh="tensor=8", batch=8, capacity=32768, piece=128)),
    ("gemma-3-12b", "v5e:2x4", dict(mesh="tensor=8", batch=8, capacity=32768, piece=128)),
    ("mixtral-8x7b", "v6e:2x4", dict(mesh="tensor=8", batch=8, capacity=32768, piece=128)),
    ("gpt-oss-20b", "v6e:2x4", dict(mesh="tensor=8", batch=32, capacity=32768, piece=32)),
    ("llama-3.2-1b", "v5p", dict(batch=32, capacity=16384, piece=32)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chip", "options"), WHOLE, ids=[name for name, *_ in WHOLE])
def test_generation_never_copies_the_cache(name, chip, options):
    program = programs.generation(name, chip=chip, prompt=1024, new_tokens=64, **options)
    assert program.compiled.memory.aliases >= program.cache  # written where it lies
    assert program.temporaries < 0.1
    assert program.compiled.memory.peak > program.weights + program.cache


def test_a_few_layers_on_eight_chips():
    options = dict(batch=4, prompt=256, new_tokens=16, capacity=32768, piece=64)
    program = programs.generation(few_layers(4), chip="v5e:2x4", mesh="tensor=8", **options)
    assert program.compiled.memory.aliases >= program.cache
    assert program.temporaries < 0.1
    whole = 2 * 4 * 8 * 32768 * 128 * 2 * 4  # keys and values, layers, heads, slots, channels, bytes, rows
    assert program.cache == pytest.approx(whole / 8, rel=0.01)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "mesh", "share"),
    [
        ("int8", "tensor=8", 0.516),
        pytest.param("fp8", "tensor=2,sequence=4", 0.516, marks=SLOW),
        pytest.param("int4", "tensor=8", 0.28, marks=SLOW),
    ],
)
def test_narrow_caches_are_written_in_place(kind, mesh, share):
    """Prefill in pieces and the decode loop. share: of what bfloat16 takes, scales and tiles included."""
    options = dict(batch=4, prompt=256, new_tokens=16, capacity=131_072, piece=64)
    program = programs.generation(few_layers(2), chip="v5e:2x4", mesh=mesh, cache=kind, **options)
    assert program.compiled.memory.aliases >= program.cache
    assert program.temporaries < 0.1
    whole = 2 * 2 * 8 * 131_072 * 128 * 2 * 4  # keys and values, layers, heads, slots, channels, bytes, rows
    assert program.cache < share * whole / 8


def test_a_mesh_that_does_not_divide():
    with pytest.raises(InputError, match="heads=32"):
        programs.generation("llama-3.1-8b", chip="v5e:2x4", mesh="tensor=3")
