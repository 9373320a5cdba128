"""Quantised models on meshes: every field goes where its part of the matrix is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantised_models as tiny

import jaxinf
from jaxinf.quant import QTensor

TOKENS = np.arange(24).reshape(4, 6) % 40


def mixed(layout: str) -> jaxinf.LM:
    """Formats of groups that chips cut, zeros, codebooks, outliers in rows that chips split."""

    def change(path: str, w: jax.Array) -> QTensor:
        name = next(n for n in ("query", "key", "value", "out", "up", "gate", "down") if n in path.split("."))
        lead, columns = w.shape[:-2], w.shape[-1]
        if name in ("out", "down") and len(w.shape) - (layout == "stacked") == 2:
            # Split by rows: chip i has some of the groups, and the outliers that are in its rows.
            rows = jnp.broadcast_to(jnp.asarray([3, -1, 40, 63], jnp.int32), (*lead, 4))
            wide = jnp.broadcast_to(jnp.linspace(-1, 1, 4 * columns).reshape(4, columns), (*lead, 4, columns))
            q = tiny.rounded(w, name="int4" if name == "down" else "int8")
            values = q.values.astype(jnp.int8).at[..., jnp.asarray([3, 40, 63]), :].set(0).astype(q.values.dtype)
            return dataclasses.replace(q, values=values, outliers=wide, rows=rows)
        if name == "key":
            q = tiny.rounded(w, name="int4", group=16)
            return dataclasses.replace(q, zeros=jnp.ones((*lead, 4, columns)))
        return tiny.rounded(w, name=dict(query="nf4", value="int8", up="mxfp4", gate="kmeans4").get(name, "int4"))

    return jaxinf.LM(tiny.changed(tiny.model(tiny.SPARSE, layout), change))


@functools.cache
def alone(layout: str):
    lm = mixed(layout)
    return lm, lm.logits(TOKENS), [c.tokens for c in lm.generate(TOKENS[:, :4].tolist(), 12, eos=())]


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [("tensor=4", "list"), ("expert=2,tensor=2", "stacked"), ("data=2,pipeline=2", "stacked")],
)
@pytest.mark.filterwarnings("ignore:mesh=.* takes the first")
def test_the_same_logits_and_tokens(mesh: str, layout: str) -> None:
    lm, logits, tokens = alone(layout)
    spread = lm.shard(mesh)
    np.testing.assert_allclose(spread.logits(TOKENS), logits, atol=1e-4)
    assert [c.tokens for c in spread.generate(TOKENS[:, :4].tolist(), 12, eos=())] == tokens
