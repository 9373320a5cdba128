"""Zig-zag order and stripes: which token is where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh, over

from pallas_kernels.errors import InputError
from sharding import stripes, zigzag
from sharding.collectives import index


def test_each_chip_has_an_early_and_a_late_chunk() -> None:
    got = zigzag.zigzag_positions(16, 4)
    np.testing.assert_array_equal(got, [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]])
    # The work of a chip under a causal mask: keys that its queries see.
    assert len({int((row + 1).sum()) for row in got}) == 1
    with pytest.raises(InputError, match="total=15 tokens do not cut into 2 \\* 4 chunks: pad them to 16"):
        zigzag.zigzag_positions(15, 4)


@pytest.mark.parametrize(("total", "chips"), [(16, 4), (13, 2), (1, 8), (30, 1)])
def test_there_and_back(total: int, chips: int) -> None:
    x = jnp.arange(2 * total * 3).reshape(2, total, 3)
    there = zigzag.to_zigzag(x, chips)
    assert there.shape[1] == zigzag.padded(total, chips)
    assert there.shape[1] % (2 * chips) == 0
    np.testing.assert_array_equal(zigzag.from_zigzag(there, chips, total=total), x)


@pytest.mark.parametrize(("total", "chips"), [(16, 4), (13, 2), (37, 8)])
def test_within_a_program(total: int, chips: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, total, 2)).astype(np.float32)
    lengths = np.array([total, 1, (total + 1) // 2], np.int32)
    wanted = np.array([[0, total - 1, -1, 3], [5, 5, 999, 0], [1, 2, 4, total - 2]], np.int32)

    def run(x, lengths, wanted):
        own = zigzag.share(x)
        tokens = own.shape[1]
        return (
            own,
            zigzag.local_positions(tokens)[None],
            zigzag.whole(own, total=total),
            zigzag.take(own, wanted, 1),
            zigzag.take_last(own, lengths),
        )

    specs = (P(None, "sequence"), P(None, "sequence"), P(), P(), P())
    own, positions, whole, taken, last = over(mesh(sequence=chips), run, (P(), P(), P()), specs)(x, lengths, wanted)
    np.testing.assert_array_equal(own, zigzag.to_zigzag(jnp.asarray(x), chips))
    np.testing.assert_array_equal(
        positions[0], zigzag.zigzag_positions(zigzag.padded(total, chips), chips).reshape(-1)
    )
    np.testing.assert_array_equal(whole, x)
    rows = np.arange(3)
    inside = (wanted >= 0) & (wanted < total)
    np.testing.assert_array_equal(
        taken, np.where(inside[..., None], x[rows[:, None], np.where(inside, wanted, 0)], 0)
    )
    np.testing.assert_array_equal(last, x[rows, lengths - 1])

    columns = own.shape[1] // chips
    chip, column = zigzag.last_token(jnp.asarray(lengths), columns, chips)
    np.testing.assert_array_equal(np.asarray(own)[rows, chip * columns + column], last)


def test_a_pass_is_split_where_it_begins_and_there_are_chips() -> None:
    found = []

    def run():
        found.append([zigzag.splits(2, True), zigzag.splits(2, False), zigzag.splits(1, True)])
        return jnp.zeros(())

    over(mesh(sequence=2), run, (), P())()
    over(mesh(tensor=2), run, (), P())()
    assert found == [[True, False, False], [False, False, False]]


@pytest.mark.parametrize(("total", "chips"), [(16, 2), (64, 4), (24, 4), (16, 8), (48, 8)])
def test_zigzag_becomes_stripes(total: int, chips: int) -> None:
    """Token p ends on chip p mod n, in slot p // n, whether or not chunks are whole numbers of stripes."""
    x = jnp.arange(2.0 * total).reshape(2, 1, total, 1)
    tokens = P(None, None, "sequence")
    got = over(mesh(sequence=chips), stripes.from_zigzag, (tokens,), tokens)(zigzag.to_zigzag(x, chips, 2))
    want = np.asarray(x).reshape(2, 1, -1, chips, 1).swapaxes(2, 3).reshape(x.shape)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("chips", [1, 3, 8])
@pytest.mark.parametrize("total", [1, 2, 7, 16])
def test_picking_a_chips_tokens(total: int, chips: int) -> None:
    starts, counts = np.array([0, 5, 11]), np.array([total, max(0, total - 3), 1])
    x = np.random.default_rng(0).normal(size=(3, 2, total, 4)).astype(np.float32)
    for chip in range(chips):
        got, first, real = stripes.pick(
            jnp.asarray(x), jnp.asarray(starts), jnp.asarray(counts), jnp.int32(chip), chips
        )
        for b in range(3):
            mine = [t for t in range(counts[b]) if (starts[b] + t) % chips == chip]
            assert real[b] == len(mine)
            np.testing.assert_array_equal(got[b, :, : len(mine)], x[b][:, mine])
            if mine:
                assert first[b] == (starts[b] + mine[0]) // chips
            held = [p for p in range(starts[b]) if p % chips == chip]
            assert stripes.slots(jnp.asarray(starts), jnp.int32(chip), chips)[b] == len(held)


def test_groups_are_neighbours_along_an_axis() -> None:
    from sharding.groups import Group

    near = Group(2)

    def run(x):
        whole = near.gather(x, 1)
        return (
            near.index[None],
            near.max(x),
            whole,
            near.scatter(whole, 1),
            near.exchange(whole, 1, 0),
            near.rotate(x),
            near.part(whole, 1),
        )

    x = np.arange(4.0, dtype=np.float32)[:, None] + 1  # chip i has i + 1
    places, top, whole, sums, traded, turned, own = jax.tree.map(
        np.asarray, over(mesh(tensor=4), run, (P("tensor"),), P("tensor"))(x)
    )
    np.testing.assert_array_equal(places, [0, 1, 0, 1])
    np.testing.assert_array_equal(top[:, 0], [2, 2, 4, 4])
    np.testing.assert_array_equal(whole, [[1, 2], [1, 2], [3, 4], [3, 4]])
    np.testing.assert_array_equal(sums[:, 0], [2, 4, 6, 8])
    np.testing.assert_array_equal(traded[:, 0], [1, 1, 2, 2, 3, 3, 4, 4])
    np.testing.assert_array_equal(turned[:, 0], [2, 1, 4, 3])
    np.testing.assert_array_equal(own, x)
    assert Group(1).part(x, 0) is x
    assert index("tensor") == 0
