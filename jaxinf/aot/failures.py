"""What the TPU compiler refuses, as errors of ours."""

import re
from collections.abc import Sequence

from pallas_kernels.errors import InputError, JaxinfError, UnsupportedError

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NAMES = {"vmem": "VMEM", "smem": "SMEM", "hbm": "HBM"}
_SIZE = r"([\d.]+)([BKMGT]?)"
_SCOPED = re.compile(rf"Scoped allocation with size {_SIZE} and limit {_SIZE} exceeded scoped (\w+)")
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available (\w+) \({_SIZE}\)")
_ALLOCATION = re.compile(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\).*?space=(\w+)", re.S)
_CAPACITY = re.compile(rf"Used {_SIZE} of {_SIZE} (\w+)")


class TooLarge(InputError):
    """A program needs more of a memory than there is.

    Attributes:
      space: "vmem", "smem" or "hbm".
      needed, available: bytes.
    """

    def __init__(self, space: str, needed: int, available: int, advice: str) -> None:
        self.space, self.needed, self.available = space, needed, available
        sizes = f"{_mib(needed)} of {_NAMES.get(space, space)}, and {_mib(available)} are available"
        super().__init__(f"the program needs {sizes}: {advice}.")


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.2f} MiB ({size:,} bytes)"


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _too_large(space: str, needed: Sequence[str], available: Sequence[str]) -> TooLarge:
    space = space.lower()
    advice = "make its blocks smaller"
    if space == "hbm":
        advice = "take more chips, a smaller batch or context, or narrower weights"
    return TooLarge(space, _bytes(*needed), _bytes(*available), advice)


def explain(error: Exception) -> JaxinfError | None:
    """The error of ours that says what the compiler's means, or None where it is not the compiler's refusal."""
    if isinstance(error, JaxinfError):
        return error
    text = str(error)
    if found := _SCOPED.search(text):
        advice = "make its blocks smaller or raise the kernel's `vmem_limit_bytes`"
        return TooLarge(found[5].lower(), _bytes(found[1], found[2]), _bytes(found[3], found[4]), advice)
    if found := _CAPACITY.search(text):
        return _too_large(found[5], found.group(1, 2), found.group(3, 4))
    if found := _ALLOCATION.search(text):
        return _too_large(found[3], (found[1], ""), (found[2], ""))
    if found := _TEMPORARIES.search(text):
        return _too_large(found[3], found.group(1, 2), found.group(4, 5))
    refused = ("Mosaic", "Pallas", "XLA:TPU", "UNIMPLEMENTED", "INVALID_ARGUMENT", "INTERNAL", "RESOURCE_EXHAUSTED")
    if isinstance(error, NotImplementedError) or any(mark in text for mark in refused):
        return UnsupportedError(f"the TPU compiler refuses the program: {_first_lines(text)}")
    return None


def _first_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count])[:500]


def kind(error: Exception) -> str:
    """One word for programs: "vmem", "smem", "hbm", "unsupported", "input" or "defect"."""
    if isinstance(error, TooLarge):
        return error.space
    if isinstance(error, UnsupportedError):
        return "unsupported"
    return "input" if isinstance(error, JaxinfError) else "defect"
