"""Which entries of an array lie where."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from sharding import meshes
from sharding.placement import Dim, Placed, padded, repeated


def laid(dim: Dim) -> np.ndarray:
    """The whole placed dimension, from its definition: zeros behind, blocks one after the other."""
    own = np.arange(1, dim.size + 1)
    out = np.repeat(own.reshape(-1, dim.block), dim.times, axis=0).reshape(-1)
    return np.concatenate([out, np.zeros(dim.padding, int)])


@st.composite
def dims(draw) -> Dim:
    if draw(st.booleans()):
        return padded(draw(st.integers(1, 20)), draw(st.integers(1, 8)))
    blocks, block = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ways = draw(st.sampled_from([blocks * n for n in (1, 2, 3)] + [n for n in (1, 2) if blocks % n == 0]))
    return repeated(blocks * block, blocks, ways)


@given(dims(), st.data())
def test_any_range_of_a_dimension_is_what_the_definition_says(dim: Dim, data) -> None:
    start = data.draw(st.integers(0, dim.placed))
    stop = data.draw(st.integers(start, dim.placed))
    placed = Placed((), np.dtype(int), (dim,), PartitionSpec(None))
    own = np.arange(1, dim.size + 1)
    got = placed.take(lambda index: own[index], (slice(start, stop),))
    np.testing.assert_array_equal(got, laid(dim)[start:stop])
    np.testing.assert_array_equal(laid(dim)[dim.own()], own)


def test_each_part_of_a_repeated_head_asks_for_that_head_alone() -> None:
    dim = repeated(2 * 3, blocks=2, ways=4)
    assert dim.placed == 12
    for chip in range(4):
        own, which, zeros = dim.source(3 * chip, 3 * chip + 3)
        assert (own, which, zeros) == (slice(3 * (chip // 2), 3 * (chip // 2) + 3), None, 0)


def test_an_array_is_split_padded_and_repeated_on_eight_devices() -> None:
    mesh = meshes.make("data=2,tensor=4")
    placed = Placed(
        (), np.dtype(np.float32), (padded(6, 4), repeated(4, blocks=2, ways=4)), PartitionSpec("tensor", None)
    )
    own = np.arange(1.0, 25.0, dtype=np.float32).reshape(6, 4)
    asked = []

    def read(index):
        asked.append(index)
        return own[index]

    out = placed.put(read, mesh)
    assert out.shape == (8, 8)
    assert len(asked) == 4, "the two of `data` share what was read"
    want = np.zeros((8, 8), np.float32)
    want[:6] = own[:, [0, 1, 0, 1, 2, 3, 2, 3]]
    np.testing.assert_array_equal(out, want)
    assert {s.data.shape for s in out.addressable_shards} == {(2, 8)}
    np.testing.assert_array_equal(placed.fetch(out), own)
    np.testing.assert_array_equal(placed.place(jax.numpy.asarray(own), mesh), want)


def test_what_is_not_the_announced_shape_is_a_defect() -> None:
    placed = Placed((), np.dtype(np.float32), (Dim(3),), PartitionSpec(None))
    with pytest.raises(AssertionError, match="not \\[3\\]"):
        placed.place(np.zeros(4, np.float32), meshes.make("tensor=8"))
