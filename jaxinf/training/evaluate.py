"""Bits per byte of a model and of xz over the same text: the figure of merit of the embedded models."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.generation.score import target_logprobs
from jaxinf.models import CausalLM
from jaxinf.training.data import Documents
from pallas_kernels.errors import InputError


def xz_bits_per_byte(data: bytes) -> float:
    """What `xz -9e` needs for `data` by itself, container included."""
    if not data:
        raise InputError("no text was given: give at least one byte")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def windows(targets: int, context: int, stride: int) -> list[tuple[int, int]]:
    """`(start, first)` of each window: it reads tokens `start .. start + context - 1`, predicts the one after
    each, and scores its predictions from `first` on.

    Every one of `targets` predictions is scored once, and all but the first window's have at least
    `context - stride` tokens before them in their window.
    """
    if not 1 <= stride <= context:
        raise InputError(f"stride={stride} must be between 1 and context={context}")
    found = [(0, 0)]
    done = min(context, targets)
    while done < targets:
        end = min(done + stride, targets)
        found.append((end - context, context - (end - done)))
        done = end
    return found


def bits_per_byte(
    model: CausalLM,
    documents: Documents,
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Bits that `model` needs per byte of `documents`, which it reads end to end.

    The end-of-text tokens between documents are predicted and paid for too; the very first is given.

    Args:
      context: tokens of a window.
      stride: tokens by which windows move; None: half of `context`. Less costs more and sees more context.
      batch: windows at a time.
      progress: called with (windows done, windows in all).
    """
    tokens = documents.tokens.astype(np.int32)
    targets = len(tokens) - 1
    if targets < 1 or documents.bytes < 1:
        raise InputError("no text was given: give at least one byte")
    context = min(context, targets)
    plan = windows(targets, context, min(context, stride or max(1, context // 2)))
    graph, state = nnx.split(model)
    nats = 0.0
    for at in range(0, len(plan), batch):
        part = plan[at : at + batch]
        starts = np.array([start for start, _ in part] + [0] * (batch - len(part)))
        first = np.array([first for _, first in part] + [context] * (batch - len(part)))
        rows = tokens[starts[:, None] + np.arange(context + 1)]
        scored = np.arange(context) >= first[:, None]
        nats -= float(np.sum(np.asarray(_logprobs(graph, state, rows), np.float64), where=scored))
        if progress is not None:
            progress(at + len(part), len(plan))
    return nats / math.log(2) / documents.bytes


@partial(jax.jit, static_argnums=0)
def _logprobs(graph, state, rows: jax.Array) -> jax.Array:
    """int32 `[B, T + 1]` -> log-probability of each next token, float32 `[B, T]`."""
    counts = jnp.full((rows.shape[0],), rows.shape[1] - 1, jnp.int32)
    return target_logprobs(nnx.merge(graph, state), rows[:, :-1], rows[:, 1:], counts)[0]
