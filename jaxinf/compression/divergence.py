"""How far a model is from the one that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.compression.observing import run
from jaxinf.compression.walking import Walk
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError

_POSITIONS = 256
"""Whose logits are there at a time."""


@dataclass(frozen=True)
class Divergence:
    """
    Attributes:
      kl: mean over positions of KL(reference || other), nats a token.
      agreement: the share of positions at which both find the same token likeliest, given the same text before.
    """

    kl: float
    agreement: float


def divergence(
    reference: CausalLM, other: CausalLM, tokens: np.ndarray, *, batch: int = 4, same_routing: bool = False
) -> Divergence:
    """Of `other` from `reference`, on text.

    Args:
      tokens: int `[rows, length]`.
      batch: rows at a time.
      same_routing: in mixtures the other's tokens go where those of the reference do, with the same weights. Left
        free, near ties go either way, and what those cost is counted too.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or reference.spec != other.spec:
        raise InputError(
            f"tokens of shape {tokens.shape} must be [rows, length], for two models of one architecture"
        )
    walks, kl, agreed = (Walk(reference), Walk(other)), 0.0, 0
    ends = [nnx.split(m) for m in (reference, other)]
    for start in range(0, len(tokens), batch):
        rows = jnp.asarray(tokens[start : start + batch], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
        x, y = (m.embedded(rows, positions) for m in (reference, other))
        for layer in range(reference.spec.depth):
            x, routing = run(walks[0].block(layer), x)
            y, _ = run(walks[1].block(layer), y, routing if same_routing else None)
        part, same = _compare(ends[0][0], ends[0][1], ends[1][0], ends[1][1], x, y)
        kl, agreed = kl + float(part), agreed + int(same)
    return Divergence(kl / tokens.size, agreed / tokens.size)


@partial(jax.jit, static_argnums=(0, 2))
def _compare(graph, state, other_graph, other_state, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the positions of `x, y [B, T, d]`."""
    models = [nnx.merge(graph, state), nnx.merge(other_graph, other_state)]
    total = x.shape[0] * x.shape[1]
    count = -(-total // _POSITIONS)

    def cut(h: jax.Array) -> jax.Array:
        return jnp.pad(h.reshape(total, -1), ((0, count * _POSITIONS - total), (0, 0))).reshape(
            count, _POSITIONS, -1
        )

    def part(i, carry):
        logits = []
        for model, h in zip(models, pieces, strict=True):
            h = h[i] if model.final_norm is None else model.final_norm(h[i])
            logits.append(jax.nn.log_softmax(model.logits(h)))
        p, q = logits
        real = i * _POSITIONS + jnp.arange(_POSITIONS) < total
        kl = jnp.sum(jnp.where(real, jnp.sum(jnp.exp(p) * (p - q), -1), 0))
        same = jnp.sum(real & (p.argmax(-1) == q.argmax(-1)))
        return carry[0] + kl, carry[1] + same

    pieces = cut(x), cut(y)
    return jax.lax.fori_loop(0, count, part, (jnp.zeros(()), jnp.zeros((), jnp.int32)))
