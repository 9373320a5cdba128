"""The goals that the kernels are held to, each beside what is reached."""

from dataclasses import dataclass
from typing import Literal

Measure = Literal["times faster than JAX's", "times the roofline", "times faster than", "of JAX's copies a byte"]
V5E, V6E = "v5e", "v6e"


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Attributes:
      goals: chip -> figure, to be reached at least ("faster") or at most (the others).
      against: for "times faster than", the other case of the same op.
    """

    label: str
    op: str
    case: str
    measure: Measure
    goals: dict[str, float]
    against: str = ""

    @property
    def at_least(self) -> bool:
        return "faster" in self.measure


def _goal(label: str, op: str, case: str, measure: Measure, v5e: float, v6e: float, against: str = "") -> Goal:
    return Goal(label, op, case, measure, {V5E: v5e, V6E: v6e}, against)


_DENSE, _PAGED, _GROUPED, _INT8 = "flash_decode", "ragged_paged_attention", "grouped_matmul", "quantized_matmul"
_DECODE, _SMALL = "llama3-8b-decode-4k-batch32", "heads8-4-decode-1k-2k-batch128-page"
_FASTER, _ROOFLINE, _COPIES = "times faster than JAX's", "times the roofline", "of JAX's copies a byte"
_OURS = "times faster than"
_QWEN = "qwen3-30b-a3b-32-tokens-bfloat16"
_WEIGHT = "llama3-8b-4096x14336"

GOALS = (
    _goal("prefill 4k, 32/8 heads", "flash_attention", "llama3-8b-prefill-4k", _FASTER, 1.35, 2.0),
    _goal("the same, window 1024", "flash_attention", "llama3-8b-prefill-4k-window1024", _FASTER, 1.6, 2.0),
    _goal("decode 4k, batch 32, dense", _DENSE, _DECODE, _ROOFLINE, 1.02, 1.05),
    _goal("the same, page 64", _PAGED, _DECODE, _ROOFLINE, 1.02, 1.05),
    _goal("dense, int8 cache", _DENSE, f"{_DECODE}-int8", _OURS, 1.8, 1.7, against=_DECODE),
    _goal("page 64, int8 cache", _PAGED, f"{_DECODE}-int8", _OURS, 1.8, 1.7, against=_DECODE),
    _goal("page 16", _PAGED, f"{_DECODE}-page16", _ROOFLINE, 1.05, 1.1),
    *(_goal(f"8/4 heads, 1k-2k, page {n}", _PAGED, f"{_SMALL}{n}", _COPIES, 0.25, 0.25) for n in (64, 128, 256)),
    _goal("grouped 4096x4096x14336, 8 groups", _GROUPED, "even-8-of-4096", _ROOFLINE, 1.05, 1.2),
    _goal("32 tokens, 8 of 128 experts, up", _GROUPED, f"{_QWEN}-up", _ROOFLINE, 1.15, 1.15),
    _goal("the same, down", _GROUPED, f"{_QWEN}-down", _ROOFLINE, 1.15, 1.15),
    _goal("int8 weights, 32 rows", _INT8, f"{_WEIGHT}-32-rows-int8", _ROOFLINE, 1.05, 1.05),
    _goal("int8 weights, 4096 rows", _INT8, f"{_WEIGHT}-4096-rows-int8", _ROOFLINE, 1.05, 1.1),
)
