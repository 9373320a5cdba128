"""What is asked of a plan, and what a plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxinf.aot.slices import Slice
from jaxinf.models import ModelSpec

ARITHMETIC = "arithmetic"
"""The witness of figures that no compiler was asked for."""


@dataclass(frozen=True)
class Case:
    """A model and what it is to serve.

    Attributes:
      model: its name, for people.
      batch: rows.
      context: tokens a row that the cache has room for; a decode step is timed with all of them there.
      prompt: tokens of each row's prompt.
      dtype: of weights, activations and, unless it is of a kind with fewer bits, the cache.
      quantize: None, or a scheme of `jaxinf.compression.quantize` for the linear weights, such as "int8".
      cache: "int8", "fp8" or "int4": keys and values in fewer bits; None: in `dtype`.
    """

    model: str
    spec: ModelSpec
    batch: int
    context: int
    prompt: int
    dtype: str = "bfloat16"
    quantize: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class PerChip:
    """Bytes of HBM a chip.

    Attributes:
      temporaries: of the hungriest program: activations, copies and what else it allocates while it runs.
      peak: all of it together, with the program's code and other arguments.
      hbm: that programs may use.
    """

    weights: int
    cache: int
    temporaries: int
    peak: int
    hbm: int

    @property
    def free(self) -> int:
        """What is left; negative: what is missing."""
        return self.hbm - self.peak


@dataclass(frozen=True)
class Use:
    """One kind of collective within a step or a pass.

    Attributes:
      axis: of the mesh; "" where the compiled program does not tell.
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      bytes: of its larger side on one chip, each time.
      chips: that take part in a group.
      times: within the step or pass.
      sent: bytes that a chip sends, all times together.
      seconds: all times together.
    """

    axis: str
    kind: str
    bytes: int
    chips: int
    times: int
    sent: float
    seconds: float


@dataclass(frozen=True)
class Terms:
    """Seconds that each resource is busy for, were it alone.

    Attributes:
      hbm: bytes between HBM and the cores at peak bandwidth.
      mxu: products at the peak rate.
      ici: collectives, one after another.
    """

    hbm: float
    mxu: float
    ici: float

    @property
    def roofline(self) -> float:
        """The least that a step can take: its busiest resource, all else behind it."""
        return max(self.hbm, self.mxu)

    @property
    def bound(self) -> str:
        """The busiest: "HBM", "MXU" or "ICI"."""
        return max(("HBM", self.hbm), ("MXU", self.mxu), ("ICI", self.ici), key=lambda pair: pair[1])[0]


@dataclass(frozen=True)
class Decode:
    """One token for each row, the context full."""

    step_seconds: float
    tokens_per_second: float
    bound: str
    terms: Terms
    witness: str = ARITHMETIC

    @property
    def tokens_per_second_per_row(self) -> float:
        return 1 / self.step_seconds


@dataclass(frozen=True)
class Prefill:
    """All rows' prompts, up to their first tokens."""

    seconds: float
    tokens_per_second: float
    bound: str
    terms: Terms
    witness: str = ARITHMETIC


@dataclass(frozen=True)
class Ranked:
    """A mesh that was considered.

    Attributes:
      why: what it does worse than the winner; empty for the winner.
    """

    mesh: str
    fits: bool
    peak: int
    step_seconds: float
    prefill_seconds: float
    why: str = ""
    witness: str = ARITHMETIC


@dataclass(frozen=True)
class Plan:
    """How a model would run on a slice.

    Attributes:
      mesh: as `sharding.meshes.parse` reads it.
      fits: whether the peak is within a chip's HBM.
      remedy: where it does not fit: what would.
      collectives: of a decode step. prefill_collectives: of the whole prefill.
      largest_batch: rows that fit at this context; 0: none. largest_context: tokens a row that fit at this batch.
      compiler: that was asked; None: figures are arithmetic alone.
      compile_seconds: in it.
      notes: what the figures leave open.
      ranking: meshes that were considered, the best first; empty where the mesh was given.
    """

    case: Case
    where: Slice
    mesh: str
    fits: bool
    per_chip: PerChip
    decode: Decode
    prefill: Prefill
    collectives: tuple[Use, ...]
    prefill_collectives: tuple[Use, ...]
    largest_batch: int
    largest_context: int
    remedy: str = ""
    compiler: str | None = None
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    ranking: tuple[Ranked, ...] = ()

    @property
    def chip_hours_per_million_tokens(self) -> float:
        """Of decoding, at this batch."""
        return self.where.chips * 1e6 / self.decode.tokens_per_second / 3600


Sizes = Mapping[str, int]
"""Chips along each axis of a mesh."""


@dataclass(frozen=True)
class Found:
    """A plan for one mesh, before anything was compiled.

    Attributes:
      per_chip: of one device.
    """

    sizes: Sizes
    per_chip: PerChip
    decode: Terms
    prefill: Terms
    collectives: tuple[Use, ...] = ()
    prefill_collectives: tuple[Use, ...] = ()
    ticks: float = field(default=1.0)
