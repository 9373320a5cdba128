"""What a pass writes down: where rows write, and what the host reads of it."""

import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.drafters import DRAFTERS
from tiny_models import model, spec

from jaxinf.generation import Runner, SamplingParams
from jaxinf.generation.speculative import Speculator
from jaxinf.generation.speculative.speculation import appended, put_few


@pytest.mark.parametrize("more", [(), (3,)])
@pytest.mark.parametrize("width", [1, 5])
def test_rows_write_where_they_are(width: int, more: tuple[int, ...]) -> None:
    """Some rows write all they have, some a part, some nothing; what would pass the end is dropped."""
    random = np.random.default_rng(width)
    starts, counts = np.asarray([0, 3, 5, 11, 9]), np.asarray([width, 0, max(width - 1, 1), width, width])
    buffer = random.integers(0, 99, (5, 12, *more)).astype(np.int32)
    values = random.integers(100, 199, (5, width, *more)).astype(np.int32)
    want = buffer.copy()
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        end = min(start + count, 12)
        want[row, start:end] = values[row, : end - start]
    given = (jnp.asarray(buffer), jnp.asarray(starts), jnp.asarray(values), jnp.asarray(counts))
    np.testing.assert_array_equal(put_few(*given), want)
    if not more:
        np.testing.assert_array_equal(appended(*given), want)


def test_the_tally_is_read_at_any_time() -> None:
    net = model(spec())
    speculator = Speculator(Runner(net), DRAFTERS["prompt lookup"](net, 1))
    cache = speculator.runner.new_cache(2, 32, max_append=speculator.max_append)
    given = dict(params=[SamplingParams()] * 2, seeds=[0, 0], eos=())
    batch = speculator.begin([[1, 2, 3, 1, 2], [4]], cache, limits=[20, 1], **given)
    assert not batch.tally.passes.any()
    batch.advance(2)
    first = batch.tally
    assert first.passes.tolist() == [2, 0]
    batch.advance(1)
    assert batch.tally.passes.tolist() == [3, 0]
    assert first.passes.tolist() == [2, 0]
