"""Attention over tokens that several chips share, against attention by its definition on one."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from meshes import mesh, over

from pallas_kernels import flash_attention
from sharding import zigzag

TOKENS = P(None, None, "sequence")
EVERYTHING = dict(softcap=2.0, scale=0.4, sinks=True, alibi_slopes=True)


def compare(form, total, chips, *, heads=4, kv_heads=2, batch=2, lengths=None, sinks=None, **mask):
    """Largest differences of outputs and of log-sum-exps; tokens beyond `lengths` are NaN."""
    draw, dim = np.random.default_rng(0).normal, 8
    q, k, v = (draw(size=(batch, h, total, dim)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    mask = dict(mask, sinks=jnp.linspace(-1.0, 2.0, heads) if sinks else None)
    if mask.get("alibi_slopes"):
        mask["alibi_slopes"] = jnp.linspace(0.5, 0.05, heads)
    options = dict(lengths=lengths, return_lse=True, **mask)
    want = flash_attention(q, k, v, implementation="reference", **options)
    real = np.ones((batch, total), bool) if lengths is None else np.arange(total)[None] < lengths[:, None]
    q, k, v = (jnp.where(real[:, None, :, None], x, jnp.nan) for x in (q, k, v))
    given = [zigzag.to_zigzag(x, chips, 2) for x in (q, k, v)]
    if lengths is None and total % (2 * chips):
        lengths = np.full(batch, total, np.int32)

    def run(q, k, v, lengths):
        return form(q, k, v, lengths=lengths, return_lse=True, **mask)

    got = over(mesh(sequence=chips), run, (TOKENS, TOKENS, TOKENS, P()), TOKENS)(*given, lengths)
    shown = [real[:, None, :, None], real[:, None]]
    for a, b, seen in zip(got, want, shown, strict=True):
        a = zigzag.from_zigzag(a, chips, 2, total)
        np.testing.assert_allclose(np.where(seen, a, 0), np.where(seen, b, 0), atol=2e-6, rtol=2e-6)
