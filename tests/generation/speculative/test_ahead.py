"""PaSS: the same tokens, of which the first drafted one is always right."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation.speculative.runs import Task, rows_of
from tiny_models import model, spec

from jaxinf.generation import SamplingParams
from jaxinf.generation.speculative import PaSS
from jaxinf.models.drafting import AheadSpec, AheadTokens
from pallas_kernels.errors import InputError

PROMPTS = [[1, 2, 3], list(range(1, 31)), [5] * 12, [9]]
LIMITS = [24, 9, 1, 24]


def ahead(tokens: int = 2, d_model: int = 32) -> AheadTokens:
    return AheadTokens(AheadSpec(d_model, tokens), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("temperature", [None, 0.9])
def test_rows_are_those_of_plain_decoding(temperature: float | None) -> None:
    net = model(spec(window=6))
    params = [SamplingParams(), *[SamplingParams(temperature=temperature or 0.0)] * 3]
    task = Task(net, PROMPTS, LIMITS, params, eos=[7])
    one, after, written = task.drafted(PaSS(ahead()))
    got = rows_of(one, written)
    assert got == rows_of(task.plain)
    accepted, offered = after.tally.accepted.sum(0), after.tally.offered.sum(0)
    assert accepted[0] == offered[0] > 0
    assert accepted[1] < offered[1]
    assert after.cache.lengths.tolist() == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, got, strict=True)]


@pytest.mark.parametrize("positions", [None, 64])
def test_columns_ahead_have_their_own_embeddings(positions: int | None) -> None:
    """Those of real tokens, given so, change nothing."""
    import dataclasses

    made = dataclasses.replace(spec(layers=1), learned_positions=positions, embed_scale=3.0)
    net = model(made)
    tokens = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)
    given = 3.0 * net.embed(tokens)[0, 3:]
    blank = tokens.at[:, 3:].set(0)
    np.testing.assert_allclose(net.hidden(blank, ahead=given)[0], net.hidden(tokens)[0], atol=1e-5)
    assert np.abs(net.hidden(blank)[0][:, 3:] - net.hidden(tokens)[0][:, 3:]).max() > 0.1


@pytest.mark.parametrize(
    ("drafter", "says"),
    [
        (PaSS(ahead(), tokens=4), "draft_tokens=4 must be a whole number from 1 to 3"),
        (PaSS(ahead(15)), "draft_tokens=16"),
        (PaSS(ahead(d_model=16)), "d_model=16"),
        (PaSS(ahead(), target="0" * 64), "trained for another model"),
    ],
)
def test_bad_input(drafter: PaSS, says: str) -> None:
    with pytest.raises(InputError, match=says):
        drafter.check(model(spec()))
