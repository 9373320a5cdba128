"""What chips send, counted in compiled programs, beside the textbook formula of each parallelism."""

import dataclasses

import pytest
from tpu_compiler import compiles

from jaxinf.aot import programs
from jaxinf.models import presets

pytestmark = compiles

LAYERS, D, HEADS, KV, HEAD_DIM, BYTES, CHIPS = 8, 4096, 32, 8, 128, 2, 8
SPEC = presets.preset("llama-3.1-8b")
SPEC = dataclasses.replace(SPEC, segments=(dataclasses.replace(SPEC.segments[0], repeats=LAYERS),), vocab=4096)
ROWS, PROMPT = 8, 1024


def sent(mesh: str, part: str, *, batch: int = ROWS, prompt: int = PROMPT) -> dict[str, float]:
    """Bytes that a chip sends, by kind of collective; without the few numbers a row that choose a token."""
    options = dict(part=part, batch=batch, prompt=prompt, capacity=2 * prompt, new_tokens=8)
    program = programs.generation(SPEC, chip="v5e:2x4", mesh=mesh, **options)
    found: dict[str, float] = {}
    for c in program.compiled.collectives:
        if c.bytes > 64:
            found[c.kind] = found.get(c.kind, 0.0) + c.sent * c.times
    return found


def all_reduce(size: float, chips: int = CHIPS) -> float:
    return 2 * (chips - 1) / chips * size


def test_tensor() -> None:
    """Megatron: two all-reduces of the activations a layer, and one after the embedding."""
    assert sent("tensor=8", "decode") == pytest.approx(
        {"all-reduce": (2 * LAYERS + 1) * all_reduce(ROWS * D * BYTES)}
    )


def test_data() -> None:
    assert sent("data=8", "decode") == {}


def test_sequence_decode() -> None:
    """Flash-Decoding across chips: sums of attention's output, and of the weights, and the largest score."""
    each = ROWS * HEADS * (HEAD_DIM + 2) * 4
    assert sent("sequence=8", "decode") == pytest.approx({"all-reduce": LAYERS * all_reduce(each)})


def test_ulysses() -> None:
    """Queries there and results back, keys and values there (each chip's share of heads); then keys and values once
    more, from the order of the pass to the stripes of the cache. The last token's state goes to all chips."""
    local = PROMPT // CHIPS
    away = (CHIPS - 1) / CHIPS
    exchanged = LAYERS * away * local * HEAD_DIM * BYTES * (2 * HEADS + 2 * KV + 2 * KV)
    want = {"all-to-all": exchanged, "all-reduce": all_reduce(D * BYTES)}
    assert sent("sequence=8", "prefill", batch=1) == pytest.approx(want)


@pytest.mark.slow
def test_ring() -> None:
    """Keys and values pass every other chip; then they go to the stripes of the cache."""
    prompt = 32768
    local = prompt // CHIPS
    keys_and_values = 2 * local * KV * HEAD_DIM * BYTES
    want = {
        "collective-permute": LAYERS * (CHIPS - 1) * keys_and_values,
        "all-to-all": LAYERS * (CHIPS - 1) / CHIPS * keys_and_values,
        "all-reduce": all_reduce(D * BYTES),
    }
    assert sent("sequence=8", "prefill", batch=1, prompt=prompt) == pytest.approx(want)


def test_pipeline() -> None:
    """A micro-batch to the next stage at each tick, and all results to all stages; idle ticks send too."""
    stages, tensor = 4, 2
    micro = ROWS // stages * D * BYTES
    ticks = 2 * stages - 1
    found = sent("pipeline=4,tensor=2", "decode")
    assert found["collective-permute"] == pytest.approx(ticks * micro)
    layers = 2 * ticks * LAYERS // stages * all_reduce(micro, tensor)
    ends = all_reduce(stages * micro, tensor) + all_reduce(stages * micro, stages)
    assert found["all-reduce"] == pytest.approx(layers + ends)
