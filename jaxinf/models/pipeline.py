"""Stages of layers on different chips, and micro-batches that follow each other through them.

GPipe (Huang et al. 2019): stage i of p holds an equal part of a stack of layers, and the caches of those. The rows
of a pass are cut into m micro-batches; at tick t stage i works on micro-batch t - i and hands its result to stage
i + 1. A pass takes m + p - 1 ticks, of which each stage is idle in p - 1. An idle stage computes too, on rows of no
tokens, of which nothing is kept.

A stage keeps the caches of its micro-batches one after another along the axis of layers, so that the layer's index
picks both and no cache is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Step
from jaxinf.layers import ExpertChoice, MoESpec
from jaxinf.models.spec import ModelSpec, Segment
from sharding.collectives import index, psum, rotate, size

AXIS = "pipeline"


def in_stages(spec: ModelSpec, segment: int) -> bool:
    """Whether a pipeline cuts this segment: every stage has all of a lead or a remainder, which is no stack."""
    longest = max(range(len(spec.segments)), key=lambda i: spec.segments[i].layers)
    return spec.segments[segment].repeats > 1 or segment == longest


def micro_batches(rows: int, segment: Segment) -> int:
    """Into how many parts `rows` are cut: as many as there are stages, or the next smaller number that divides.

    Where experts choose among rows, these stay together.
    """
    if any(
        isinstance(layer.ffn, MoESpec) and isinstance(layer.ffn.router, ExpertChoice) for layer in segment.period
    ):
        return 1
    return max(m for m in range(1, size(AXIS) + 1) if rows % m == 0)


def through_stages(
    run: Callable[[jax.Array, Step, Any, jax.Array | None, jax.Array], tuple[jax.Array, Any, jax.Array]],
    x: jax.Array,
    step: Step,
    caches: Any,
    segment_ids: jax.Array | None,
    *,
    layers: int,
    parts: int,
) -> tuple[jax.Array, Any, jax.Array]:
    """A stack of layers over all stages.

    Args:
      run: this stage's layers: `(x, step, caches, segment_ids, first) -> (x, caches, loss)`, where layer l of the
        stage has its cache at `first + l`.
      x: `[B, T, d]`, the same on all stages. caches: with `parts * layers` entries, of `B / parts` rows.
      layers: of this stage. parts: micro-batches.

    Returns:
      `(x, caches, balancing loss)`, x and the loss on all stages.
    """
    rows, stages, stage = x.shape[0], size(AXIS), index(AXIS)

    def cut(value: Any) -> Any:
        return None if value is None else value.reshape(parts, rows // parts, *value.shape[1:])

    counts = jnp.full((rows,), step.tokens, jnp.int32) if step.counts is None else step.counts
    given = cut(x), cut(step.positions), cut(counts), cut(segment_ids)

    def tick(t, carry):
        arrived, done, caches, loss = carry
        mine = t - stage
        at = jnp.clip(mine, 0, parts - 1)
        works = (mine >= 0) & (mine < parts)
        first, positions, counts, segments = jax.tree.map(
            lambda part: jax.lax.dynamic_index_in_dim(part, at, 0, keepdims=False), given
        )
        now = dataclasses.replace(step, positions=positions, counts=jnp.where(works, counts, 0))
        x = jnp.where(stage == 0, first, arrived)
        y, caches, extra = run(x, now, caches, segments, at * layers)
        loss = loss + jnp.where(works, extra, 0.0)
        kept = jax.lax.dynamic_index_in_dim(done, at, 0, keepdims=False)
        last = works & (stage == stages - 1)
        done = jax.lax.dynamic_update_index_in_dim(done, jnp.where(last, y, kept), at, 0)
        return rotate(y, AXIS), done, caches, loss

    start = (jnp.zeros_like(given[0][0]), jnp.zeros_like(given[0]), caches, jnp.zeros((), jnp.float32))
    _, done, caches, loss = jax.lax.fori_loop(0, parts + stages - 1, tick, start)
    done = psum(jnp.where(stage == stages - 1, done, jnp.zeros_like(done)), AXIS)
    return done.reshape(x.shape), caches, psum(loss, AXIS) / parts
