"""Names of chips and slices; what is said where there is no compiler."""

import importlib.metadata

import pytest
from tpu_compiler import needs_compiler

from jaxinf.aot import topology
from pallas_kernels.errors import InputError, UnsupportedError


@pytest.mark.parametrize(
    ("name", "described", "size", "accelerator"),
    [
        ("v5e", "v5e:2x2", 4, "v5litepod-4"),
        ("v5e:4x4", "v5e:4x4", 16, "v5litepod-16"),
        ("v5p:2x2x2", "v5p:2x2x2", 8, "v5p-16"),  # named by cores, two a chip
        ("tpu7x", "tpu7x:2x2x1", 4, "tpu7x-8"),
        ("v6e", "v6e:2x2", 4, "v6e-4"),
    ],
)
def test_slices(name: str, described: str, size: int, accelerator: str) -> None:
    where = topology.find(name)
    assert (where.topology, where.chips, where.accelerator) == (described, size, accelerator)


@pytest.mark.parametrize("name", ["v9", "h100:2x2"])
def test_an_unknown_chip(name: str) -> None:
    with pytest.raises(InputError, match=r"v5e.*v6e"):
        topology.find(name)


@pytest.mark.parametrize("name", ["v5e:4", "v5e:0x2", "v5e:two"])
def test_a_topology_that_is_none(name: str) -> None:
    with pytest.raises(InputError, match="4x4"):
        topology.find(name)


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(topology, "version", absent)
    topology.devices.cache_clear()
    assert not topology.available()
    with pytest.raises(UnsupportedError, match=r"jaxinf\[tpu\]"):
        topology.devices("v5e")


@needs_compiler
@pytest.mark.parametrize(("name", "devices"), [("v5e", 4), ("v6e:2x4", 8), ("7x", 8), ("v5p", 4)])
def test_described_devices(name: str, devices: int) -> None:
    found = topology.devices(name)
    assert len(found) == devices
    assert found[0].device_kind in topology.find(name).chip.kinds


@needs_compiler
def test_a_slice_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="v5e:3x5"):
        topology.devices("v5e:3x5")


@needs_compiler
def test_a_mesh_larger_than_its_slice() -> None:
    with pytest.raises(InputError, match="needs 8 devices, but 'v5e' has 4"):
        topology.mesh("v5e", (8,), ("tensor",))
