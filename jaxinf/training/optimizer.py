"""Muon for matrices, AdamW for the rest, and the schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon


@dataclass(frozen=True)
class OptimizerSpec:
    """Peak learning rates and the schedule's shape.

    matrix_rate: of Muon (Jordan 2024), which serves the projections; an update's spectral norm is about this.
    other_rate: of AdamW, which serves embeddings, routers and norms.
    warmup: part of the run, of [0, 1], in which the rate rises from 0; then it falls linearly to 0.
    clip: largest global norm of the gradient.
    """

    matrix_rate: float = 0.02
    other_rate: float = 0.004
    weight_decay: float = 0.0
    momentum: float = 0.95
    warmup: float = 0.02
    clip: float = 1.0


def rate_factor(spec: OptimizerSpec, progress: float) -> float:
    """What multiplies the peak rates at `progress` in [0, 1] of the run."""
    rise = 1.0 if spec.warmup <= 0 else progress / spec.warmup
    return max(0.0, min(rise, (1.0 - progress) / max(1.0 - spec.warmup, 1e-9), 1.0))


def uses_muon(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a projection: a matrix, or a stack of the experts' matrices."""
    names = path.split("/")
    return len(shape) >= 2 and not {"embed", "head", "router", "positions"} & set(names) and min(shape[-2:]) > 1


def make_optimizer(spec: OptimizerSpec, shapes: Mapping[str, tuple[int, ...]]) -> optax.GradientTransformation:
    """Peak-rate updates of a flat dict of parameters of `shapes`; scale them by `rate_factor`.

    Matrices may have leading axes (stacked experts `[E, in, out]`): each matrix is orthogonalised by itself.
    """
    # None means AdamW to optax, which its annotation of this argument leaves out.
    dimensions: Any = {
        path: MuonDimensionNumbers(len(shape) - 2, len(shape) - 1) if uses_muon(path, shape) else None
        for path, shape in shapes.items()
    }
    return optax.chain(
        optax.clip_by_global_norm(spec.clip),
        muon(
            spec.matrix_rate,
            beta=spec.momentum,
            weight_decay=spec.weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            adam_learning_rate=spec.other_rate,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def scaled_update(
    optimizer: optax.GradientTransformation,
    gradients: dict[str, jax.Array],
    state: optax.OptState,
    params: dict[str, jax.Array],
    factor: jax.Array,
) -> tuple[dict[str, jax.Array], optax.OptState]:
    """Parameters and state after one update, its size multiplied by `factor` (float32 scalar)."""
    updates, state = optimizer.update(gradients, state, params)
    return jax.tree.map(lambda x, update: x + factor * update.astype(x.dtype), params, updates), state
