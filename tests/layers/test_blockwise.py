"""Feed-forward parts block by block of tokens, against all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RMSNormSpec, TokenChoice
from jaxinf.layers.blockwise import LEAST, block_tokens, by_blocks
from jaxinf.models import CausalLM, ModelSpec, fold

TOKENS = np.random.default_rng(0).integers(0, 23, (2, 19)).astype(np.int32)


def model(placement="pre", ffn=None, **options) -> CausalLM:
    layer = LayerSpec(AttentionSpec(4, 2, 8), ffn or FFNSpec(24), RMSNormSpec(), placement, **options)
    return CausalLM(ModelSpec(23, 16, fold([layer] * 2), 64), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("columns", [1, 4, 7, 18, 19, 64])
def test_every_token_once(columns: int) -> None:
    x, y = (np.random.default_rng(i).normal(size=(2, 19, 3)).astype(np.float32) for i in range(2))
    widest = []

    def function(x, y, z):
        widest.append(x.shape[1])
        return 2 * x + y, jnp.float32(3.0)

    assert by_blocks(lambda x, y: function(x, y, None), 2 * columns, x, y)[1] == 3
    out, loss = by_blocks(function, 2 * columns + 1, x, y, None)
    np.testing.assert_array_equal(out, 2 * x + y)
    assert loss == 3
    assert max(widest) == min(columns, 19)


def test_a_block_follows_the_chips_memory() -> None:
    llama = FFNSpec(14336).token_bytes(4096)
    assert block_tokens(llama) == 1024  # 16 GB of a v5e; tests see no other chip
    assert block_tokens(llama // 16) == 16 * 1024
    assert block_tokens(1 << 40) == LEAST
    mixture = MoESpec(8, 14336, TokenChoice(top_k=2), shared=FFNSpec(64))
    assert mixture.token_bytes(4096) == 2 * llama + FFNSpec(64).token_bytes(4096)


PLACEMENTS = ["pre", "renormed", "post", "sandwich", "parallel", "parallel_two_norms"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_model_computes_the_same(monkeypatch, placement) -> None:
    lm = model(placement, residual_scale=0.5)
    want = lm(TOKENS)
    monkeypatch.setattr("jaxinf.layers.block.block_tokens", lambda _: 8)
    np.testing.assert_allclose(lm(TOKENS), want, atol=1e-5)

    def loss(lm):
        return jnp.sum(jnp.sin(lm(TOKENS)))

    blocks = jax.tree.leaves(nnx.grad(loss)(lm))
    monkeypatch.undo()
    for got, whole in zip(blocks, jax.tree.leaves(nnx.grad(loss)(lm)), strict=True):
        np.testing.assert_allclose(got, whole, atol=1e-4)


def test_a_mixture_in_blocks_only_where_no_loss_is_wanted(monkeypatch) -> None:
    lm = model(ffn=MoESpec(4, 8, TokenChoice(top_k=2)))
    want, balance = lm.train_logits(TOKENS)
    hidden, _, _ = lm.hidden(TOKENS, lm.init_cache(2, 32), fresh=True)
    monkeypatch.setattr("jaxinf.layers.block.block_tokens", lambda _: 8)
    got, same = lm.train_logits(TOKENS)
    np.testing.assert_array_equal(got, want)
    assert same == balance
    blocks, _, _ = lm.hidden(TOKENS, lm.init_cache(2, 32), fresh=True)
    np.testing.assert_allclose(blocks, hidden, atol=1e-5)
