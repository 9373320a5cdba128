"""Attention with every score written out: the definition that the attention ops' references share."""

import jax
import jax.numpy as jnp

from pallas_kernels.masks import Rules, distances, visible

HIGHEST = jax.lax.Precision.HIGHEST


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rules: Rules,
    *,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """q [B, N, T, D], k [B, K, S, D], v [B, K, S, Dv] -> (out [B, N, T, Dv], log-sum-exp [B, N, T]), float32.

    positions: int32 [B | 1, S], what the slots of k and v hold; their index by default.
    """
    batch, heads, queries, _ = q.shape
    groups = k.shape[1]
    t, s = jnp.arange(queries), jnp.arange(k.shape[2])
    positions = s[None] if positions is None else positions
    seen = visible(rules, t, s, positions)
    seen = jnp.ones((), bool) if seen is None else seen
    seen = jnp.broadcast_to(seen, (batch, heads, queries, k.shape[2]))
    # Hidden memory may hold anything, and 0 * nan is nan, in gradients too: so it is emptied first.
    used_keys = seen.reshape(batch, groups, heads // groups * queries, k.shape[2]).any(2)[..., None]
    q = jnp.where(seen.any(-1)[..., None], q, 0).astype(jnp.float32)
    k = jnp.where(used_keys, k, 0).astype(jnp.float32)
    v = jnp.where(used_keys, v, 0).astype(jnp.float32)
    k, v = (jnp.repeat(x, heads // groups, axis=1) for x in (k, v))

    scores = scale * jnp.einsum("bntd,bnsd->bnts", q, k, precision=HIGHEST)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores += alibi_slopes[:, None, None] * distances(rules, t, positions)[:, None].astype(jnp.float32)
    peak = jnp.max(scores, axis=-1, where=seen, initial=-jnp.inf)
    sink = jnp.full((heads, 1), -jnp.inf) if sinks is None else sinks[:, None]
    peak = jnp.maximum(peak, sink)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - peak[..., None], 0.0)), 0.0)
    total = weights.sum(-1) + jnp.exp(sink - peak)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bnts,bnsd->bntd", weights / total[..., None], v, precision=HIGHEST)
    return out, jnp.where(some, peak + jnp.log(total), -jnp.inf)
