"""Sizes of the shapes that HLO text writes, such as `bf16[8,128]{1,0}`."""

import math
import re

_BITS = {"pred": 8, "bf16": 16, "tf32": 32, "c64": 64, "c128": 128, "token": 0}


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[suf](\d+)", dtype)  # s4, u8, f32, f8e4m3fn
    return int(found[1]) if found else 0


def shapes(text: str) -> list[int]:
    """Bytes of each array shape in the text, without layouts' padding."""
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)
    return [-(-_bits(dtype) * math.prod(int(n) for n in dims.split(",") if n) // 8) for dtype, dims in found]


def shape_bytes(text: str) -> int:
    """Bytes of all array shapes in the text."""
    return sum(shapes(text))
