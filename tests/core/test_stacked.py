"""One layer of stacked arrays."""

import jax
import jax.numpy as jnp

from jaxinf.core.stacked import Stacked, unstack


def test_it_travels_through_jit_as_its_two_arrays():
    whole = jnp.arange(6.0).reshape(3, 2)

    @jax.jit
    def read(stacked):
        array, layer = unstack(stacked)
        return array[layer]

    assert read(Stacked(whole, jnp.int32(1))).tolist() == [2.0, 3.0]


def test_an_array_is_its_own_layer():
    array, layer = unstack(jnp.ones(3))
    assert array.shape == (3,)
    assert layer is None
