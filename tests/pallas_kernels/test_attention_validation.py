"""What the attention ops refuse, and that the message names the argument."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import cache_append, flash_attention, flash_decode
from pallas_kernels.errors import InputError
from pallas_kernels.flash_attention import XlaBlocks
from pallas_kernels.flash_decode import Blocks as DecodeBlocks

Q, KV = jnp.ones((2, 4, 3, 8)), jnp.ones((2, 2, 5, 8))
ONES = jnp.ones(2, jnp.int32)

ATTENTION = [
    (dict(q=Q[0]), "q.shape"),
    (dict(q=Q.astype(jnp.int32)), "q.dtype"),
    (dict(q=Q.astype(jnp.bfloat16)), "bfloat16, float32, float32"),
    (dict(k=KV[..., :4]), "k.shape"),
    (dict(k=KV[:1], v=KV[:1]), "k.shape"),
    (dict(v=KV[:, :, :4]), "v.shape"),
    (dict(q=Q[:, :3]), "multiple"),
    (dict(window=0), "window=0"),
    (dict(window=-2), "window=-2"),
    (dict(window=(-1, 0)), "window="),
    (dict(softcap=0.0), "softcap=0.0"),
    (dict(scale=float("nan")), "scale=nan"),
    (dict(sinks=jnp.ones(3)), "sinks.shape"),
    (dict(sinks=jnp.ones(4, jnp.int32)), "sinks.dtype"),
    (dict(alibi_slopes=jnp.ones((4, 1))), "alibi_slopes.shape"),
    (dict(q_segment_ids=jnp.ones((2, 3), jnp.int32)), "kv_segment_ids"),
    (dict(q_segment_ids=jnp.ones((2, 3)), kv_segment_ids=jnp.ones((2, 5), jnp.int32)), "q_segment_ids.dtype"),
    (dict(lengths=jnp.array([5, 6])), "lengths="),
    (dict(lengths=jnp.array([-1, 2])), "lengths="),
    (dict(lengths=jnp.ones(3, jnp.int32)), "lengths.shape"),
    (dict(lengths=jnp.ones(2)), "lengths.dtype"),
    (dict(q_offset=jnp.ones(3, jnp.int32)), "q_offset.shape"),
    (dict(q_offset=1.5), "q_offset.dtype"),
    (dict(block_mask=jnp.ones((2, 2))), "block_mask.dtype"),
    (dict(block_mask=jnp.ones((4, 2), bool)), "block_mask.shape"),
    (dict(block_mask=jnp.ones((3, 2, 2), bool)), "block_mask.shape"),
    (dict(ancestor_mask=jnp.ones((2, 2), bool)), "ancestor_mask.shape"),
    (dict(ancestor_mask=jnp.ones((3, 3))), "ancestor_mask.dtype"),
    (dict(implementation="pallas_tpu"), "implementation="),
]


@pytest.mark.parametrize(("changes", "message"), ATTENTION)
def test_attention_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        flash_attention(**(dict(q=Q, k=KV, v=KV) | changes))


STACK = jnp.ones((3, 2, 2, 5, 8))
SCALE = jnp.ones((2, 2, 5))
DECODE = [
    (dict(k=STACK, v=STACK), "layer=0..2"),
    (dict(layer=0), "layer=None"),
    (dict(k=STACK, v=STACK, layer=3), "layer="),
    (dict(k=STACK, v=STACK, layer=1.0), "layer.dtype"),
    (dict(k=KV[0, 0]), "k.shape"),
    (dict(v=KV.astype(jnp.bfloat16)), "k and v"),
    (dict(k=KV.astype(jnp.int32)), "k.dtype"),
    (dict(k=KV.astype(jnp.int8), v=KV.astype(jnp.int8)), "k_scale"),
    (dict(k_scale=SCALE[:1]), "k_scale.shape"),
    (dict(v_scale=SCALE.astype(jnp.bfloat16)), "v_scale.dtype"),
    (dict(lengths=jnp.array([3, 9])), "lengths="),
    (dict(lengths=jnp.array([3, -1]), ring=True), "lengths="),
    (dict(q=Q[:, :3]), "multiple"),
    (dict(window=0), "window=0"),
    (dict(softcap=-1.0), "softcap=-1.0"),
    (dict(ancestor_mask=jnp.ones((2, 2), bool)), "ancestor_mask.shape"),
    (dict(implementation="fast"), "implementation="),
]


@pytest.mark.parametrize(("changes", "message"), DECODE)
def test_decode_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        flash_decode(**(dict(q=Q, k=KV, v=KV, lengths=3 * ONES) | changes))


NEW = jnp.ones((2, 2, 3, 8))
APPEND = [
    (dict(new=NEW[:1]), "new.shape"),
    (dict(new=NEW[..., :4]), "new.shape"),
    (dict(cache=KV, layer=0), "layer=None"),
    (dict(layer=None), "layer=0..2"),
    (dict(layer=-1), "layer="),
    (dict(starts=jnp.array([0, -1])), "starts="),
    (dict(starts=jnp.zeros(2)), "starts.dtype"),
    (dict(starts=jnp.zeros(3, jnp.int32)), "starts.shape"),
    (dict(counts=jnp.array([1, 4])), "counts="),
    (dict(cache=STACK.astype(jnp.int8)), "int8"),
    (dict(cache=STACK.astype(jnp.int32)), "cache.dtype"),
    (dict(implementation="xl"), "implementation="),
]


@pytest.mark.parametrize(("changes", "message"), APPEND)
def test_append_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        cache_append(**(dict(cache=STACK, new=NEW, layer=1, starts=ONES) | changes))


def test_blocks_refuse():
    with pytest.raises(InputError, match="blocks="):
        XlaBlocks(0, 4)
    with pytest.raises(InputError, match="blocks="):
        DecodeBlocks(-1)


def test_values_are_not_checked_under_jit():
    """Lengths past the end mean the end; the documentation says so."""
    run = jax.jit(lambda lengths: flash_attention(Q, KV, KV, causal=False, lengths=lengths))
    assert bool((run(jnp.array([99, 5])) == run(jnp.array([5, 5]))).all())
