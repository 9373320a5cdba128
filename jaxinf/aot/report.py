"""What compiling one job gave."""

from dataclasses import dataclass

from jaxinf.aot.collectives import Collective
from jaxinf.aot.memory import Memory
from jaxinf.aot.static import Estimate, Timeline


@dataclass(frozen=True)
class Report:
    """A compiled program.

    Attributes:
      chip: the slice's name.
      compiler: its version.
      flops, bytes: XLA's own count of a call; the body of a loop counts once, kernels count nothing.
      estimate, timeline: the static model's, where it was asked for.
    """

    chip: str
    compiler: str
    compile_seconds: float
    memory: Memory
    collectives: tuple[Collective, ...]
    flops: float
    bytes: float
    estimate: Estimate | None = None
    timeline: Timeline | None = None
