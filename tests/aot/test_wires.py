"""Times of collectives, and what the axes of a mesh run along."""

import pytest

from jaxinf.aot import wires
from jaxinf.aot.slices import HOP, find

MB = 1e6


def test_an_axis_takes_whole_axes_of_the_slice() -> None:
    found = wires.ways(find("v5e-16"), {"tensor": 16})
    assert [w.length for w in found["tensor"]] == [4, 4]
    found = wires.ways(find("v5e-16"), {"data": 4, "tensor": 4})
    assert [w.length for w in found["tensor"]] == [4]
    assert [w.length for w in found["data"]] == [4]


def test_an_axis_may_take_a_part_of_one() -> None:
    found = wires.ways(find("v5e-16"), {"data": 2, "tensor": 8})
    assert sorted(w.length for w in found["tensor"]) == [2, 4]
    assert [w.length for w in found["data"]] == [2]


def test_rings_are_twice_as_fast_as_lines() -> None:
    line, ring = (wires.Way(16, ring, 50e9) for ring in (False, True))
    slow = wires.seconds("all-gather", 100 * MB, (line,))
    assert slow == pytest.approx(15 / 16 * 100 * MB / 50e9)
    assert slow == pytest.approx(2 * wires.seconds("all-gather", 100 * MB, (ring,)))


def test_an_all_reduce_is_two_gathers() -> None:
    way = wires.ways(find("v6e-64"), {"tensor": 64})["tensor"]
    gather = wires.seconds("all-gather", 10 * MB, way)
    assert wires.seconds("all-reduce", 10 * MB, way) == pytest.approx(2 * gather)
    assert wires.seconds("reduce-scatter", 10 * MB, way) == pytest.approx(gather)


def test_little_data_takes_its_hops() -> None:
    way = wires.ways(find("v5e-16"), {"tensor": 16})["tensor"]
    assert wires.seconds("all-reduce", 100, way) == pytest.approx(2 * 6 * HOP)
    assert wires.seconds("collective-permute", 100, way) == pytest.approx(HOP)


def test_an_exchange_is_bound_by_the_middle() -> None:
    way = (wires.Way(8, False, 50e9),)
    assert wires.seconds("all-to-all", 80 * MB, way) == pytest.approx(80 * MB * 8 / 4 / 50e9)


def test_nobody_to_talk_to() -> None:
    assert wires.seconds("all-reduce", MB, ()) == 0.0


def test_a_group_of_chips_by_their_coordinates() -> None:
    where = find("v5e-16")
    box = wires.between(where, [(x, y, 0) for x in range(4) for y in range(2)])
    assert sorted((w.length, w.ring) for w in box) == [(2, False), (4, False)]
    assert [w.length for w in wires.between(where, [(0, 0, 0), (1, 1, 0), (2, 2, 0)])] == [3]
    torus = wires.between(find("v5p-128"), [(x, 0, 0, 0) for x in range(4)])
    assert [(w.length, w.ring) for w in torus] == [(4, True)]
    pair = wires.between(find("7x"), [(0, 0, 0, 0), (0, 0, 0, 1)])
    assert pair[0].link == wires.ON_CHIP * find("7x").facts.wires.link


def test_neighbours_along_an_axis() -> None:
    tensor = wires.ways(find("v5p-128"), {"tensor": 64})["tensor"]
    assert [(w.length, w.ring) for w in wires.part(tensor, 8)] == [(4, True), (2, False)]
    assert wires.part(tensor, 64) == tensor
    assert wires.part((), 1) == ()
