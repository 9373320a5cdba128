"""Merging attention over disjoint parts of the keys by their log-sum-exps."""

import jax
import jax.numpy as jnp


def merge_partials(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from attention over each.

    With partial outputs o_i and log-sum-exps l_i, l = log sum_i exp(l_i) and o = sum_i exp(l_i - l) o_i
    (Dao et al. 2023, Flash-Decoding).

    Args:
      parts: `(out [..., T, D], lse float32 [..., T])` each; a part without visible keys has lse = -inf.

    Returns:
      `(out [..., T, D]` in the first part's dtype, `lse float32 [..., T])`; 0 and -inf where no part sees a key.
    """
    lses = jnp.stack([lse for _, lse in parts])
    top = jnp.max(lses, axis=0)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(lses - safe)
    total = jnp.sum(weights, axis=0)
    outs = jnp.stack([out.astype(jnp.float32) for out, _ in parts])
    out = jnp.sum(weights[..., None] * outs, axis=0) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.astype(parts[0][0].dtype), jnp.log(total) + safe


def add_partial(
    total: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`merge_partials` of two, for sums that grow part by part: `total` and the result are float32 `(out, lse)`.

    Differentiable where neither sees a key, too.
    """
    (out, lse), (new, new_lse) = total, part
    top = jax.lax.stop_gradient(jnp.maximum(lse, new_lse))
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    old_weight, new_weight = jnp.exp(lse - safe), jnp.exp(new_lse - safe)
    weight = old_weight + new_weight
    some = weight > 0
    weight = jnp.where(some, weight, 1.0)
    out = out * (old_weight / weight)[..., None] + new.astype(jnp.float32) * (new_weight / weight)[..., None]
    return out, jnp.where(some, jnp.log(weight) + safe, -jnp.inf)
