"""Names of slices, and what they are made of."""

import pytest

from jaxinf.aot import slices
from pallas_kernels import chips
from pallas_kernels.errors import InputError


@pytest.mark.parametrize(
    ("name", "chip_count", "cores", "devices", "shape"),
    [
        ("v5e-1", 1, 1, 1, (1, 1)),
        ("v5e-16", 16, 16, 16, (4, 4)),
        ("v5litepod-8", 8, 8, 8, (2, 4)),
        ("v6e-64", 64, 64, 64, (8, 8)),
        ("v5p-128", 64, 128, 64, (4, 4, 4)),  # named by cores
        ("v4-8", 4, 8, 8, (2, 2, 1)),
        ("tpu7x:2x2x1", 4, 8, 8, (2, 2, 1)),  # a device a core
        ("tpu7x-128", 64, 128, 128, (4, 4, 4)),
        ("v5e:4x4", 16, 16, 16, (4, 4)),
        ("V6E", 4, 4, 4, (2, 2)),
    ],
)
def test_slices(name: str, chip_count: int, cores: int, devices: int, shape: tuple[int, ...]) -> None:
    where = slices.find(name)
    assert (where.chips, where.cores, where.devices, where.shape) == (chip_count, cores, devices, shape)


def test_what_is_smaller_than_the_compiler_describes_is_part_of_the_smallest() -> None:
    assert slices.find("v5e-1").topology == "v5e:2x2"
    assert slices.find("v5e-16").topology == "v5e:4x4"
    assert slices.find("v5p-128").topology == "v5p:4x4x4"


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5e-16", (False, False)),
        ("v5e-128", (False, True)),  # an axis of 16 closes
        ("v6e-256", (True, True)),
        ("v5p-64", (False, False, False)),  # 2x4x4 is no whole cube
        ("v5p-128", (True, True, True)),
    ],
)
def test_which_axes_are_rings(name: str, rings: tuple[bool, ...]) -> None:
    assert slices.find(name).rings == rings


@pytest.mark.parametrize("chip", list(chips.CHIPS))
def test_names_are_found_again(chip: str) -> None:
    named = list(slices.named(chip))
    assert [slices.find(name).shape for name, _ in named] == [shape for _, shape in named]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e-12", r"v5e-8, v5e-16.*counts chips"),
        ("v5p-100", r"v5p-128.*counts cores"),
        ("v9-4", "v5e, v5p"),
        ("v5e:4x4x4", "2 sizes such as 4x4"),
        ("v5p:4x4", "3 sizes such as 2x2x1"),
        ("v6e:0x4", "4x4"),
    ],
)
def test_what_does_not_exist(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        slices.find(name)


def test_a_device_of_a_chip_with_two_has_half_of_its_bandwidth() -> None:
    chip = chips.find("7x")
    where = slices.find("7x")
    assert where.bandwidth == chip.bandwidth / 2
    assert 2 * where.memory < chip.hbm * 1.08
