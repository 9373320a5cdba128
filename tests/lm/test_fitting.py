"""A model that cannot fit the TPUs is not read."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxinf.lm import fitting
from pallas_kernels.errors import InputError

TINY = Path(__file__).parents[1] / "goldens" / "llama"


@dataclass(frozen=True)
class Device:
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    bytes_limit: int = 1 << 34

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.bytes_limit}


def test_a_tpu_that_is_too_small_is_told() -> None:
    with pytest.raises(InputError, match=r"llama cannot fit one device.*TPU v5 lite has 0\.00 GiB"):
        fitting.check(TINY, devices=[Device(bytes_limit=1000)])


def test_what_fits_passes_and_other_platforms_are_not_asked() -> None:
    fitting.check(TINY, devices=[Device()])
    fitting.check(TINY, devices=[Device("cpu", "cpu", 1)])
    fitting.check(TINY)
