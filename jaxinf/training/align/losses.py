"""How far a draft's next-token distribution q is from its target's p: DistillSpec's losses (Zhou et al. 2023,
arXiv:2310.08461), and what speculative decoding makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError

Loss = Literal["forward-kl", "reverse-kl", "tvd"]
Divergence = Callable[[jax.Array, jax.Array], jax.Array]
"""`(log p, log q)`, float32 `[..., V]` -> float32 `[...]`."""


def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`sum_x p(x) (log p(x) - log q(x))`, nats: the draft must cover all that the target may say."""
    return jnp.sum(_times(log_p, log_p - log_q), axis=-1)


def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`sum_x q(x) (log q(x) - log p(x))`, nats: the draft must not say what the target would not."""
    return jnp.sum(_times(log_q, log_q - log_p), axis=-1)


def tvd(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`1/2 sum_x |p(x) - q(x)|`, total variation distance: the share of rejected drafts at temperature 1."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def acceptance(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`sum_x min(p(x), q(x)) = 1 - TVD`: how likely a token drawn from q is accepted (Leviathan et al. 2023,
    arXiv:2211.17192, Corollary 3.6)."""
    return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)


def agreement(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """1 where both have the same most likely token, else 0: acceptance at temperature 0."""
    return (jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)).astype(jnp.float32)


def _times(log_weight: jax.Array, x: jax.Array) -> jax.Array:
    # 0 log 0 = 0: a token that is ruled out adds nothing.
    return jnp.where(jnp.isneginf(log_weight), 0.0, jnp.exp(log_weight) * x)


DIVERGENCES: dict[Loss, Divergence] = {"forward-kl": forward_kl, "reverse-kl": reverse_kl, "tvd": tvd}


def divergence(name: str) -> Divergence:
    """A loss by its name.

    Raises:
      InputError: an unknown name (lists them).
    """
    if name not in DIVERGENCES:
        raise InputError(f"loss={name!r} must be one of {', '.join(get_args(Loss))}")
    return DIVERGENCES[name]


def compare(
    target: CausalLM, draft: CausalLM, tokens: jax.Array, measures: tuple[Divergence, ...], *, size: int = 512
) -> tuple[jax.Array, ...]:
    """What each measure says of the two models' distributions after every token.

    Logits are made and, under differentiation, made again `size` positions at a time: never `[B, T, V]` at once.
    Gradients reach the draft alone.

    Args:
      target, draft: of one vocabulary.
      tokens: int32 `[B, T]`.

    Returns:
      float32 `[B, T]` a measure.
    """
    batch, total = tokens.shape
    hidden = tuple(model.hidden(tokens)[0] for model in (target, draft))
    hidden = (jax.lax.stop_gradient(hidden[0]), hidden[1])
    count = batch * total
    size = min(size, count)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x.reshape(count, -1), ((0, -count % size), (0, 0)))
        return x.reshape(-1, size, x.shape[-1])

    @jax.checkpoint
    def part(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(target.logits(at[0])))
        log_q = jax.nn.log_softmax(draft.logits(at[1]))
        return tuple(measure(log_p, log_q) for measure in measures)

    found = jax.lax.map(part, (cut(hidden[0]), cut(hidden[1])))
    return tuple(x.reshape(-1)[:count].reshape(batch, total) for x in found)
