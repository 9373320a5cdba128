"""How well a draft matches its target: on text, and on what the target itself writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinf.models import CausalLM
from jaxinf.training.align.losses import acceptance, agreement, compare
from jaxinf.training.align.text import distinct_share, spread
from jaxinf.training.drafters.continuations import continuations
from pallas_kernels.errors import InputError

LOOPING = 0.5
"""A greedy continuation with a smaller share of distinct 4-grams repeats itself and is left out."""


@dataclass(frozen=True)
class Contexts:
    """Rows of tokens whose predictions are compared.

    name: what they are. rows: int32 `[B, T]`; predictions of the tokens from place `first` on are compared, 1 at
    least. left_out: rows that looped and are not among them.
    """

    name: str
    rows: np.ndarray
    first: int
    left_out: int = 0

    @property
    def places(self) -> int:
        """Predictions that are compared."""
        return len(self.rows) * (self.rows.shape[1] - self.first)


@dataclass(frozen=True)
class Match:
    """Means over the compared places of one kind of contexts.

    acceptance: `sum_x min(p, q)`, the share of drafted tokens accepted at temperature 1.
    agreement: the share of places where both models' most likely token is the same: accepted at temperature 0.
    """

    acceptance: float
    agreement: float


def make_contexts(
    target: CausalLM,
    held_out: np.ndarray,
    *,
    rows: int = 128,
    length: int = 192,
    prompt: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Contexts, ...]:
    """Held-out text, and the target's own continuations of its pieces, at temperature 1 and greedy.

    Args:
      held_out: tokens `[N]` that neither model has learned from.
      rows, length: pieces and tokens of each; prompt: tokens of a piece that are continued to its length.

    Returns:
      Two or three kinds: greedy continuations are not among them where all of them loop.

    Raises:
      InputError: the text does not hold one piece, or the prompt is not shorter than it.
    """
    if not 1 <= prompt < length:
        raise InputError(f"prompt={prompt} must be at least 1 and below length={length}")
    text = spread(held_out, rows, length)

    def write(temperature: float, done: int) -> np.ndarray:
        def note(here: int, _: int) -> None:
            if progress is not None:
                progress(done + here, 2 * len(text))

        options: Any = dict(temperatures=(temperature,), seed=seed, batch=min(64, len(text)), progress=note)
        return continuations(target, text[:, :prompt], tokens=length - prompt, **options)

    sampled, greedy = write(1.0, 0), write(0.0, len(text))
    lively = np.array([distinct_share(row[prompt:]) >= LOOPING for row in greedy])
    found = [Contexts("held-out text", text, 1), Contexts("target's text, temperature 1", sampled, prompt)]
    if lively.any():
        found.append(Contexts("target's text, greedy", greedy[lively], prompt, int(np.sum(~lively))))
    return tuple(found)


def measure(
    target: CausalLM, draft: CausalLM, contexts: Sequence[Contexts], *, batch: int = 16
) -> tuple[Match, ...]:
    """A `Match` a kind of contexts."""
    (graph_p, p), (graph_q, q) = nnx.split(target), nnx.split(draft)
    found = []
    for some in contexts:
        totals = np.zeros(2)
        for at in range(0, len(some.rows), batch):
            rows = some.rows[np.arange(at, at + batch) % len(some.rows)]  # a last batch is filled up
            real = min(batch, len(some.rows) - at)
            values = jax.device_get(_measures(graph_p, graph_q, p, q, rows[:, :-1]))
            totals += [np.sum(x[:real, some.first - 1 :], dtype=np.float64) for x in values]
        found.append(Match(*(totals / some.places).tolist()))
    return tuple(found)


@partial(jax.jit, static_argnums=(0, 1))
def _measures(graph_p, graph_q, p, q, rows):
    return compare(nnx.merge(graph_p, p), nnx.merge(graph_q, q), rows, (acceptance, agreement))


def rejections_gone(before: float, after: float) -> float:
    """Of the drafted tokens that were rejected, the share that no longer is: `1 - (1 - after) / (1 - before)`."""
    return 1.0 - (1.0 - after) / (1.0 - before) if before < 1.0 else 0.0


def report(contexts: Sequence[Contexts], before: Sequence[Match], after: Sequence[Match]) -> list[dict[str, Any]]:
    """A record a kind of contexts: its places, and each figure before, after, and the share of rejections gone."""
    records = []
    for some, old, new in zip(contexts, before, after, strict=True):
        record: dict[str, Any] = {"contexts": some.name, "places": some.places, "left_out": some.left_out}
        for name in ("acceptance", "agreement"):
            a, b = getattr(old, name), getattr(new, name)
            record[name] = {"before": a, "after": b, "rejections_gone": rejections_gone(a, b)}
        records.append(record)
    return records
