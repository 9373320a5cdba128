"""How many tokens a drafter would get accepted, from one reading of what the target wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.models import CausalLM
from jaxinf.training.drafters.tasks import Task


def ranks(
    task: Task,
    head: Any,
    target: CausalLM,
    rows: np.ndarray,
    *,
    batch: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Where the true tokens stand among a draft's candidates, for drafts that begin at every place of a text.

    Args:
      rows: int32 `[N, T + 1]`; with greedy continuations by the target, a token is accepted exactly if it is the
        row's own.
      batch: rows at a time.

    Returns:
      int32 `[N, T, depth]`. Entry `[n, c, s]`: how many tokens draft step s found likelier than the row's token
      c + 2 + s, in the draft that knows the feature at c and the token at c + 1, and whose earlier tokens were
      right; -1 past the end of the row.
    """
    total, length = rows.shape[0], rows.shape[1] - 1
    out = np.full((total, length, task.depth), -1, np.int32)
    for at in range(0, total, batch):
        part = rows[np.arange(at, at + batch) % total]
        found = np.asarray(_ranks(task, head, target, part))[: total - at]
        for s in range(task.depth):
            # Column c of step s stands for the draft that began at c - s; the last has no true token.
            out[at : at + batch, : length - 1 - s, s] = found[:, s : length - 1, s]
        if progress is not None:
            progress(min(at + batch, total), total)
    return out


@partial(jax.jit, static_argnums=0)
def _ranks(task: Task, head: Any, target: CausalLM, rows: jax.Array) -> jax.Array:
    true = jnp.roll(rows[:, 1:], -1, axis=1)[..., None]
    found = []
    for x in task.drafts(head, target, rows, task.depth):
        logits = target.logits(x)
        found.append(jnp.sum(logits > jnp.take_along_axis(logits, true, -1), -1, dtype=jnp.int32))
    return jnp.stack(found, -1)


def agreement(found: np.ndarray, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[int, list[float]]:
    """For each k, by step of a draft whose earlier tokens were right: how often the true one is among the k
    likeliest."""
    steps = [found[..., s][found[..., s] >= 0] for s in range(found.shape[-1])]
    return {k: [float(np.mean(x < k)) for x in steps] for k in ks}


def tokens_per_pass(found: np.ndarray, first: int, depth: int | None = None) -> float:
    """Tokens that a pass of the target gives on average with chains of `depth`, on greedy continuations.

    Every row is walked from pass to pass as generation would.

    Args:
      found: of `ranks`. first: where a continuation begins: the place of its first token in the rows.
    """
    return walked(found[..., :depth] == 0, first)


def walked(accepted: np.ndarray, first: int) -> float:
    """Tokens a pass, where bool `[N, T, depth]` says which tokens of a chain that begins at a place are right."""
    run = np.sum(np.cumprod(accepted, -1), -1)
    tokens = passes = 0
    for row in run:
        at = first - 1  # the latest token stands at + 1, and the feature before it is known
        while at + accepted.shape[-1] + 2 < len(row):
            passes += 1
            tokens += int(row[at]) + 1
            at += int(row[at]) + 1
    return tokens / passes if passes else float("nan")


def loops(tokens: np.ndarray, least: float = 0.5) -> bool:
    """Whether a completion repeats itself: fewer than this part of its runs of four tokens are distinct."""
    fours = np.lib.stride_tricks.sliding_window_view(tokens, 4)
    return len(np.unique(fours, axis=0)) < least * len(fours)
