"""Loading is refused where it cannot end well."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxinf.aot.plan import check_fits
from jaxinf.aot.plan.check import memory
from jaxinf.models import presets
from pallas_kernels.errors import InputError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    device_kind: str = "TPU v5 lite"
    stats: dict[str, Any] | None = field(default_factory=dict)

    def memory_stats(self) -> dict[str, Any] | None:
        if self.stats is None:
            raise NotImplementedError
        return self.stats


LLAMA = presets.preset("llama-3.1-8b")


def test_a_model_that_is_too_large_for_one_chip() -> None:
    refused = r"gpt-oss-20b cannot fit one device: its weights take 38\.96 GiB"
    with pytest.raises(InputError, match=refused) as caught:
        check_fits(presets.preset("gpt-oss-20b"), [Device()], model="gpt-oss-20b")
    assert "TPU v5 lite has 15.75 GiB" in str(caught.value)


def test_what_fits_passes() -> None:
    check_fits(LLAMA, [Device()], quantize="int8")
    check_fits(LLAMA, [Device("TPU v6 lite")])
    check_fits(LLAMA, [Device()] * 4, sizes={"tensor": 4})


def test_a_mesh_that_does_not_divide_weights_does_not_help() -> None:
    with pytest.raises(InputError, match='mesh="data=4"'):
        check_fits(presets.preset("llama-3.1-70b"), [Device()] * 4, sizes={"data": 4})


def test_the_advice() -> None:
    with pytest.raises(InputError, match=r"a slice such as v5e-16") as caught:
        check_fits(presets.preset("llama-3.1-70b"), [Device()] * 4, sizes={"tensor": 4}, model="llama-3.1-70b")
    assert "--" not in str(caught.value)
    with pytest.raises(InputError, match=r'quantize="int8"'):
        check_fits(presets.preset("gemma-3-12b"), [Device()])


def test_what_a_device_says_itself_goes_first() -> None:
    assert memory(Device(stats={"bytes_limit": 5})) == 5
    assert memory(Device()) == int(15.75 * GIB)
    check_fits(LLAMA, [Device(stats={"bytes_limit": 20 * GIB})])
    with pytest.raises(InputError, match=r"has 4\.00 GiB"):
        check_fits(LLAMA, [Device("TPU v6 lite", {"bytes_limit": 4 * GIB})])


def test_devices_that_tell_nothing_pass() -> None:
    check_fits(LLAMA, [Device("cpu")])
    check_fits(LLAMA, [Device("cpu", None)])
    assert memory(Device("cpu", None)) is None
