"""Programs compiled in this process, for chips that are not here."""

import aot_programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_compiler import compiles

from jaxinf.aot import TooLarge, lower
from pallas_kernels import chips
from pallas_kernels.errors import UnsupportedError

pytestmark = compiles
MIB = 1 << 20


@pytest.mark.parametrize("chip", ["v5e", "v6e", "7x"])
def test_memory_of_a_program(chip: str) -> None:
    def fn(x, y):
        return x @ y, x.at[0].set(1)

    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compiled = lower(fn, shape, np.ones((1024, 1024), np.float32), chip=chip, donate=(0,))
    memory = compiled.memory
    assert memory.arguments == 8 * MIB
    assert 0 <= memory.outputs - 8 * MIB <= 1024  # a tuple of pointers comes with it
    assert memory.aliases in (4 * MIB, 8 * MIB)
    assert memory.peak == memory.arguments + memory.outputs - memory.aliases + memory.temporaries + memory.code
    assert compiled.cost["flops"] >= 2 * 1024**3
    assert compiled.collectives == ()


def test_the_chip_is_known_while_tracing() -> None:
    seen = []

    def fn(x):
        seen.append(chips.current().name)
        return x + 1

    for chip in ("v5e", "v6e", "v5p", "7x"):
        lower(fn, jax.ShapeDtypeStruct((8, 128), jnp.float32), chip=chip)
    assert seen == ["v5e", "v6e", "v5p", "7x"]


def test_too_much_vmem_says_bytes() -> None:
    fn, args = aot_programs.held(1 << 19)
    with pytest.raises(TooLarge, match=r"256.00 MiB \(268,435,456 bytes\) of VMEM, and 128.00 MiB") as caught:
        lower(fn, *args, chip="v5e")
    assert caught.value.space == "vmem"


def test_too_much_hbm_says_bytes() -> None:
    shape = jax.ShapeDtypeStruct((1 << 18, 1 << 16), jnp.uint8)
    with pytest.raises(TooLarge, match="of HBM") as caught:
        lower(lambda x: x + x.T.reshape(x.shape), shape, chip="v5e")
    assert caught.value.needed > caught.value.available > 15e9


def test_what_the_compiler_cannot_do() -> None:
    from jax.experimental import pallas as pl

    def body(x, o):
        o[...] = jnp.sort(x[...], axis=0)

    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    with pytest.raises(UnsupportedError, match="compiler refuses"):
        lower(pl.pallas_call(body, out_shape=shape), shape)


def test_an_error_of_the_program_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="dot"):
        lower(lambda x: x @ jnp.ones((3, 3)), jax.ShapeDtypeStruct((2, 2), jnp.float32))
