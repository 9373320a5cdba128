"""Blocks that the table calls dead hold nothing visible, and what plain masks hide is called dead."""

import attention_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.flash_attention.tiles import visits
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks, default_blocks
from pallas_kernels.masks import Rules, live_blocks, ring_positions

KEYS, QUERIES = 24, 12


def by_blocks(seen, q_starts, q_size, k_starts, k_size):
    seen = seen.any((0, 1))
    return np.array([[seen[t : t + q_size, s : s + k_size].any() for s in k_starts] for t in q_starts])


@given(st.data())
def test_dead_blocks_are_hidden(data):
    number = st.integers(-4, KEYS)
    offset = np.array([data.draw(number), data.draw(number)], np.int32)
    causal, left = data.draw(st.booleans()), data.draw(st.none() | st.integers(0, KEYS))
    right = data.draw(st.none() | st.integers(0, KEYS))
    lengths = np.array([data.draw(st.integers(0, KEYS)), data.draw(st.integers(0, KEYS))], np.int32)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    plain = data.draw(st.booleans())
    extra = {}
    if not plain:
        extra = dict(
            q_segment_ids=np.sort(random.integers(0, 4, (2, QUERIES)), 1),
            kv_segment_ids=np.sort(random.integers(0, 4, (2, KEYS)), 1),
            block_mask=random.random((3, 4)) < 0.4,
            ancestor_mask=np.tril(np.ones((QUERIES, QUERIES), bool)),
        )
    rules = Rules(
        queries=QUERIES,
        keys=KEYS,
        causal=causal,
        left=left,
        right=right,
        q_offset=jnp.asarray(offset),
        lengths=jnp.asarray(lengths),
        q_segments=None if plain else jnp.asarray(extra["q_segment_ids"]),
        kv_segments=None if plain else jnp.asarray(extra["kv_segment_ids"]),
        blocks=None if plain else jnp.asarray(extra["block_mask"])[None],
        ancestors=None if plain else jnp.asarray(extra["ancestor_mask"])[None],
    )
    positions = np.tile(np.arange(KEYS), (2, 1))
    seen, _ = oracle.visible(
        1, QUERIES, positions, offset, causal=causal, window=(left, right), lengths=lengths, **extra
    )
    q_starts, k_starts = np.array([0, 4, 7]), np.array([0, 6, 12, 18])
    live = np.asarray(live_blocks(rules, jnp.asarray(q_starts), 5, jnp.asarray(k_starts), 6))
    wanted = by_blocks(seen, q_starts, 5, k_starts, 6)
    assert not (wanted & ~live).any()
    if plain and (lengths == KEYS).all() and offset[0] == offset[1]:
        np.testing.assert_array_equal(live, wanted)


@pytest.mark.parametrize(
    ("causal", "left", "wanted"),
    [(True, None, [1, 2, 3, 4]), (True, 3, [1, 2, 2, 2]), (False, None, [4, 4, 4, 4])],
)
def test_loops_visit_only_live_blocks(causal, left, wanted):
    rules = Rules(queries=16, keys=16, causal=causal, left=left, right=None, q_offset=jnp.zeros(1, jnp.int32))
    visit, counts = visits(rules, XlaBlocks(4, 4), by_keys=False)
    np.testing.assert_array_equal(counts, wanted)
    if causal:
        assert [int(visit(i, int(n) - 1)) for i, n in enumerate(wanted)] == [0, 1, 2, 3]


def test_block_mask_picks_blocks_one_by_one():
    cells = jnp.array([[[True, False, False, True], [False, True, False, False]]])
    rules = Rules(
        queries=8, keys=16, causal=False, left=None, right=None, q_offset=jnp.zeros(1, jnp.int32), blocks=cells
    )
    visit, counts = visits(rules, XlaBlocks(4, 4), by_keys=False)
    assert [[int(visit(i, n)) for n in range(int(counts[i]))] for i in range(2)] == [[0, 3], [1]]


@given(st.integers(0, 30), st.integers(1, 9))
def test_ring_positions(length, slots):
    held = ring_positions(jnp.array([length]), slots, jnp.arange(slots))[0]
    for slot, position in enumerate(held.tolist()):
        candidates = [p for p in range(length) if p % slots == slot]
        assert position == candidates[-1] if candidates else position < 0


@given(*[st.integers(1, n) for n in (8, 16, 128, 4096, 4096)])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_default_blocks_fit(platform, batch, groups, share, queries, keys):
    blocks = default_blocks(platform, batch, groups, share, queries, keys).fit(batch, groups, queries, keys)
    assert batch % blocks.rows == groups % blocks.heads == 0
    scores = blocks.rows * blocks.heads * share * blocks.q * blocks.kv
    assert scores <= {"cpu": 1 << 18, "gpu": 1 << 26}[platform]
