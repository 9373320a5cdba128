"""Attention as a head meets it while it drafts, for all places of a text at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.cache.base import AttentionRule, LayerCache, Step
from pallas_kernels.errors import UnsupportedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unrolled(LayerCache):
    """Keys and values of the steps of a draft: `keys[s] [B, K, T, D]`, rotated, are those of step s.

    Column c of step s is place c of a draft that began at c - s: before that it knows keys made of the target's own
    features (step 0), and from there on those of its own steps. So with s earlier steps the query at c sees

        step 0 at c' <= c - s,   step s - j at c - j for 0 <= j < s

    (training-time test: Li et al. 2025, EAGLE-3, arXiv:2503.01840, section 3.2; Zhang et al. 2024, HASS,
    arXiv:2408.15766). A first step is plain causal attention. Differentiable.
    """

    keys: tuple[jax.Array, ...] = ()
    values: tuple[jax.Array, ...] = ()

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        if layer is not None or step.zigzag or rule.alibi_slopes is not None:
            raise UnsupportedError(
                "drafting heads are trained on one chip, layer by layer, without linear biases by distance: take "
                "layers with rope"
            )
        q, k = rule.turn(q, step.positions), rule.turn(k, step.positions)
        after = Unrolled((*self.keys, k), (*self.values, v))
        keys, values = ([_for_queries(x, q) for x in xs] for xs in (after.keys, after.values))
        back, places = len(self.keys), jnp.arange(q.shape[2])
        scale = 1 / math.sqrt(q.shape[-1]) if rule.scale is None else rule.scale
        distance = places[:, None] - places[None, :]
        seen = distance >= back
        if rule.window is not None:
            seen &= distance < rule.window
        scores = jnp.einsum("bntd,bnsd->bnts", q, keys[0], preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen, _capped(scores, rule), -jnp.inf)
        own = []
        for j in range(back):
            score = jnp.sum(q.astype(jnp.float32) * _shifted(keys[back - j], j), -1) * scale
            here = places >= j if rule.window is None else (places >= j) & (j < rule.window)
            own.append(jnp.where(here, _capped(score, rule), -jnp.inf))
        parts = [scores, *(x[..., None] for x in own)]
        if rule.sinks is not None:
            parts.append(jnp.broadcast_to(rule.sinks[None, :, None, None], (*scores.shape[:3], 1)))
        top = jnp.max(jnp.concatenate([jnp.max(x, -1, keepdims=True) for x in parts], -1), -1, keepdims=True)
        # Columns before the first draft see nothing; they are not counted, but must stay finite.
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        weights = [jnp.exp(x - top) for x in parts]
        total = sum(jnp.sum(x, -1, keepdims=True) for x in weights)
        out = jnp.einsum("bnts,bnsd->bntd", weights[0], values[0], preferred_element_type=jnp.float32)
        for j in range(back):
            out = out + weights[1 + j] * _shifted(values[back - j], j)
        return (out / jnp.maximum(total, 1e-30)).astype(q.dtype), after

    def commit(self, starts, path, counts):
        raise UnsupportedError("a text that is learned from has no branches: make a cache for drafting")

    def map_rows(self, change):
        return Unrolled(*(tuple(change(x, 0) for x in xs) for xs in (self.keys, self.values)))

    @property
    def append_limit(self) -> int | None:
        return None

    @property
    def capacity(self) -> int | None:
        return None


def unrolled(batch: int, modules: int, blocks: int) -> Cache:
    """Caches of a head with so many modules of so many blocks, before the first step."""
    return Cache(((Unrolled(),) * blocks,) * modules, jnp.zeros((batch,), jnp.int32))


def _for_queries(x: jax.Array, q: jax.Array) -> jax.Array:
    """`[B, K, T, D]` -> `[B, N, T, D]`."""
    return jnp.repeat(x, q.shape[1] // x.shape[1], axis=1)


def _shifted(x: jax.Array, by: int) -> jax.Array:
    """What stands `by` columns before, float32 `[B, N, T, D]`; zeros before the first."""
    x = x.astype(jnp.float32)
    return x if by == 0 else jnp.pad(x, ((0, 0), (0, 0), (by, 0), (0, 0)))[:, :, : x.shape[2]]


def _capped(scores: jax.Array, rule: AttentionRule) -> jax.Array:
    return scores if rule.softcap is None else rule.softcap * jnp.tanh(scores / rule.softcap)
