"""What a model is, as data: no mesh, dtype or kernel choice in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxinf.layers import LayerSpec, MoESpec, NormSpec, RMSNormSpec
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class Segment:
    """A period of layers, repeated. Weights of the same slot of the period have the same shapes, so they stack."""

    period: tuple[LayerSpec, ...]
    repeats: int = 1

    @property
    def layers(self) -> int:
        return len(self.period) * self.repeats


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a decoder-only language model.

    context: longest sequence that the positions were made for, in tokens.
    embed_scale, logit_scale: multiply the embeddings and the logits.
    logit_softcap: logits become c * tanh(logits / c).
    learned_positions: entries of a learned position table; None: none.
    embed_norm: follows the embedding (BLOOM).
    """

    vocab: int
    d_model: int
    segments: tuple[Segment, ...]
    context: int
    final_norm: NormSpec | None = RMSNormSpec()
    tied: bool = False
    embed_scale: float = 1.0
    embed_norm: NormSpec | None = None
    learned_positions: int | None = None
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self):
        for name in ("vocab", "d_model", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.segments:
            raise InputError("segments=() must hold at least one layer")
        for i, layer in enumerate(self.layers()):
            _check_layer(layer, f"layer {i}")

    def layers(self) -> Iterator[LayerSpec]:
        """The layers from first to last."""
        for segment in self.segments:
            for _ in range(segment.repeats):
                yield from segment.period

    @property
    def depth(self) -> int:
        return sum(s.layers for s in self.segments)

    @property
    def reads_prompts_whole(self) -> bool:
        """Whether a rope follows the length of the text: pieces of a prompt would turn by other angles."""
        return self.settled is not None

    @property
    def settled(self) -> int | None:
        """Tokens up to which no rope follows the length of the text; None: none ever does."""
        ropes = [layer.attention.rope for layer in self.layers()]
        return min((r.settled for r in ropes if r is not None and r.settled is not None), default=None)


def fold(layers: Sequence[LayerSpec]) -> tuple[Segment, ...]:
    """The segments of a list of layers: the split that needs the fewest distinct blocks.

    A lead of layers that break the pattern (a dense first layer, say), the longest periodic stretch, and what
    remains: Gemma-3 27B's 62 layers fold to a period of 6 times 10 and a remainder of 2.
    """
    n = len(layers)
    if n == 0:
        return ()
    best: tuple[int, int, int, int] | None = None  # (blocks, lead, period, repeats)
    for period in range(1, n + 1):
        for lead in range(n - period + 1):
            repeats = 1
            while (
                lead + (repeats + 1) * period <= n
                and layers[lead + repeats * period : lead + (repeats + 1) * period] == layers[lead : lead + period]
            ):
                repeats += 1
            blocks = n - (repeats - 1) * period
            candidate = (blocks, lead, period, repeats)
            if best is None or candidate < best:
                best = candidate
    assert best is not None
    _, lead, period, repeats = best
    end = lead + period * repeats
    parts = [
        Segment(tuple(layers[:lead])),
        Segment(tuple(layers[lead : lead + period]), repeats),
        Segment(tuple(layers[end:])),
    ]
    return tuple(p for p in parts if p.period)


def _check_layer(layer: LayerSpec, at: str) -> None:
    a = layer.attention
    if a.heads % a.kv_heads:
        raise InputError(f"{at}: heads={a.heads} must be a multiple of kv_heads={a.kv_heads}")
    if a.rope is not None and (a.rope.dim % 2 or not 0 < a.rope.dim <= a.head_dim):
        raise InputError(f"{at}: rope dim={a.rope.dim} must be even and at most head_dim={a.head_dim}")
    if a.window is not None and a.window < 1:
        raise InputError(f"{at}: window={a.window} must be at least 1, or None")
    if isinstance(layer.ffn, MoESpec):
        top_k = getattr(layer.ffn.router, "top_k", 1)
        if not 1 <= top_k <= layer.ffn.experts:
            raise InputError(f"{at}: top_k={top_k} must be between 1 and experts={layer.ffn.experts}")
