"""How arrays lie in a device's memory."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxinf import aot
from sharding import place, row_major


def test_placing_keeps_values_and_device():
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    device = jax.devices()[3]
    assert place(x, device).devices() == {device}
    np.testing.assert_array_equal(place(x), x)
    assert not place(x).committed


def test_row_major_ends_with_the_last_axis():
    given = row_major(3, SingleDeviceSharding(jax.devices()[0]))
    assert given.layout.major_to_minor == (0, 1, 2)


@pytest.mark.skipif(not aot.available(), reason="needs libtpu")
@pytest.mark.compile
def test_rows_of_an_odd_table_are_taken_without_copying_it():
    """The TPU compiler's default for such a table is column-major, and a gather of rows then copies it."""
    table, ids = jax.ShapeDtypeStruct((20096, 2880), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
    mesh = aot.mesh("v5e")
    rows = row_major(2, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    placed = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=rows)

    def take(table, ids):
        return table.at[ids].get(mode="clip")

    copied, free = (aot.lower(take, given, ids).memory.temporaries for given in (table, placed))
    assert free == 0 < copied
