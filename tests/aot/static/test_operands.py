"""Integer operands of kernels: found in the jaxpr, laid out as scalar memory holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinf.aot.static.operands import Operand, of_kernels, pack


def operand(array: np.ndarray) -> Operand:
    return Operand(tuple(array.ravel().tolist()), array.shape, 8 * array.dtype.itemsize)


def test_words_of_a_row() -> None:
    assert pack(operand(np.array([3, -1, 7], np.int32)), "{0:T(128)}") == [3, -1, 7]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_tiles_of_a_matrix(dtype: type) -> None:
    """Element (r, c) is found where the tiled layout says: (8, 128) tiles, rows of a word packed from below."""
    array = np.random.default_rng(0).integers(-100, 100, (11, 200)).astype(dtype)
    per_word = 4 // array.dtype.itemsize
    words = pack(operand(array), f"{{1,0:T(8,128)({per_word},1)}}" if per_word > 1 else "{1,0:T(8,128)}")
    bits = 8 * array.dtype.itemsize
    for r, c in [(0, 0), (0, 199), (3, 127), (7, 128), (8, 5), (10, 199)]:
        tile = (r // 8) * 2 + c // 128
        word = words[tile * (8 // per_word) * 128 + (r % 8) // per_word * 128 + c % 128]
        value = (word >> ((r % 8) % per_word * bits)) & ((1 << bits) - 1)
        assert value == int(array[r, c]) & ((1 << bits) - 1)


def test_bytes_of_a_row() -> None:
    array = np.arange(-3, 130, dtype=np.int16).astype(np.int8)
    words = pack(operand(array), "{0:T(512)(4,1)}")
    for i in (0, 2, 100, 132):
        part, place = divmod(i, 128)
        assert (words[place] >> (8 * part)) & 255 == int(array[i]) & 255


def kernel(lengths: jax.Array, x: jax.Array) -> jax.Array:
    def body(lengths_ref, x_ref, o_ref):
        o_ref[...] = x_ref[...] * lengths_ref[0].astype(jnp.float32)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, lengths: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, lengths: (i, 0)),
    )
    return pl.pallas_call(body, grid_spec=spec, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(lengths, x)


def test_operands_are_followed_through_the_program() -> None:
    @jax.jit
    def double(lengths):
        return 2 * lengths

    def fn(lengths, x):
        return kernel(double(lengths) + 1, x) + kernel(jnp.array([9, 8], jnp.int32), x)

    shape = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    closed = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((2,), jnp.int32), shape)
    known = of_kernels(closed, [np.array([5, 6], np.int32), None])
    assert [k.operands[0].values if k.operands[0] else None for k in known] == [(11, 13), (9, 8)]
    assert [k.operands[1] for k in known] == [None, None]
    assert of_kernels(closed, [None, None])[0].operands[0] is None
