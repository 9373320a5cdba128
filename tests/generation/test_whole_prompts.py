"""Ropes that follow the length of the text need a prompt in one pass."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from jaxinf.generation import PIECE, Runner, buckets
from jaxinf.layers import DynamicNTKRopeSpec, LongRopeSpec

ROPES = {
    "dynamic": DynamicNTKRopeSpec(8, factor=4.0, original_max=64),
    "long": LongRopeSpec(8, short=(1.0,) * 4, long=(2.0, 3.0, 4.0, 5.0), original_max=PIECE + 16),
}


@pytest.mark.parametrize("name", ROPES)
def test_a_long_prompt_gives_the_logits_of_a_whole_pass(name):
    model = tiny_models.model(tiny_models.spec(context=1024, rope=ROPES[name]))
    prompt = np.random.default_rng(0).integers(0, 64, PIECE + 40).tolist()
    runner = Runner(model)
    logits, cache = runner.prefill([prompt, prompt[:20]], runner.new_cache(2, len(prompt)), fresh=True)
    for row, text in enumerate((prompt, prompt[:20])):
        want = tiny_models.whole(model, jnp.asarray([text], jnp.int32))[0, -1]
        np.testing.assert_allclose(logits[row], want, atol=2e-4)
    np.testing.assert_array_equal(cache.lengths, [len(prompt), 20])


def test_other_ropes_take_pieces():
    spec = tiny_models.spec()
    assert not spec.reads_prompts_whole
    assert buckets.pieces(PIECE + 40) == [(0, PIECE), (PIECE, 64)]
    assert buckets.pieces(PIECE + 40, whole=True) == [(0, 1024)]
