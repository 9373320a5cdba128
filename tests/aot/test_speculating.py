"""The speculative loop of two models, compiled for chips that are not here."""

import pytest
from tpu_compiler import compiles, few_layers

from jaxinf.aot import lowering, speculating

pytestmark = compiles


@pytest.mark.parametrize("temperature", [False, True])
def test_the_loop_copies_no_cache(temperature: bool) -> None:
    """Of either model: what is kept is written where it lies, and what comes beside it is small."""
    pair = speculating.speculation(
        few_layers(4),
        few_layers(1),
        chip="v5e:2x4",
        mesh="tensor=8",
        batch=4,
        capacity=32768,
        passes=8,
        quantize="int8",
        temperature=temperature,
    )
    call = pair.call
    memory = lowering.lower(call.fn, *call.args, chip="v5e:2x4", mesh=pair.mesh, donate=call.donate).memory
    assert memory.aliases >= sum(pair.cache)
    assert memory.temporaries < 0.1 * sum(pair.cache)
    whole = 2 * 4 * 8 * 32768 * 128 * 2 * 4  # keys and values, layers, heads, slots, channels, bytes, rows
    assert pair.cache[0] == pytest.approx(whole / 8, rel=0.01)
