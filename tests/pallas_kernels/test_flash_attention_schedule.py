"""Which blocks the kernel of `flash_attention` visits, against masks written out; and how its blocks are chosen."""

from dataclasses import replace

import attention_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tuned
from pallas_kernels.chips import CHIPS
from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.cases import MODELS, tree
from pallas_kernels.flash_attention.schedule import (
    BITS,
    DEAD,
    FIRST,
    FULL,
    KIND,
    LAST,
    MAX_BLOCKS,
    Grain,
    patterns,
    schedule,
    tile_list,
    tile_states,
)
from pallas_kernels.masks import Rules

GRAIN = Grain(4, 6, 2, 3)


@st.composite
def any_rules(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, keys, rows = draw(st.integers(1, 11)), draw(st.integers(1, 20)), 2
    side = st.one_of(st.none(), st.integers(0, 9))
    rules = Rules(queries, keys, draw(st.booleans()), draw(side), draw(side), random.integers(-3, keys, rows))
    if draw(st.booleans()):
        rules = replace(rules, lengths=random.integers(0, keys + 1, rows))
    if draw(st.booleans()):
        ids = random.integers(0, 3, (rows, queries)), np.sort(random.integers(0, 3, (rows, keys)))
        rules = replace(rules, q_segments=ids[0], kv_segments=ids[1])
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, 4])), random.integers(1, queries + 1), random.integers(1, keys + 1))
        rules = replace(rules, blocks=random.random(shape) < 0.6)
    if draw(st.booleans()):
        shape = type("Shape", (), dict(batch=rows, queries=queries))
        rules = replace(rules, ancestors=tree(random, shape))
    return rules


def written_out(rules):
    """bool [2, 4, T, S]."""
    positions = np.broadcast_to(np.arange(rules.keys), (2, rules.keys))
    seen, _ = oracle.visible(
        4,
        rules.queries,
        positions,
        rules.q_offset,
        causal=rules.causal,
        window=(rules.left, rules.right),
        q_segment_ids=rules.q_segments,
        kv_segment_ids=rules.kv_segments,
        lengths=rules.lengths,
        block_mask=None if rules.blocks is None else np.broadcast_to(rules.blocks, (4, *rules.blocks.shape[1:])),
        ancestor_mask=rules.ancestors,
    )
    return seen


@given(any_rules())
def test_tiles_and_steps(rules):
    """Tiles are what they are called, and every pair of blocks with a live tile is visited once."""
    heads = 2
    states = tile_states(rules, GRAIN, heads, np)
    seen = written_out(rules)
    rows, lists, down, across = states.shape
    for row, head, a, c in np.ndindex(2, 4 // heads, down, across):
        part = seen[row, head * heads : (head + 1) * heads, a * 2 : a * 2 + 2, c * 3 : c * 3 + 3]
        state = states[row % rows, head % lists, a, c]
        if state == DEAD:
            assert not part.any()
        if state == FULL:
            assert part.shape[-1] == 3
            assert part.all()
    plan = schedule(states, GRAIN, np)
    nq, nk = GRAIN.counts(rules.queries, rules.keys)
    for row, head in np.ndindex(rows, lists):
        visited = {}
        for step, word in zip(plan.steps[row, head], plan.tiles[row, head], strict=True):
            i, j = step & MAX_BLOCKS - 1, step >> BITS & MAX_BLOCKS - 1
            visited.setdefault(int(i), []).append(
                (int(j), bool(step & FIRST), bool(step & LAST), step >> KIND, word)
            )
        assert list(visited) == list(range(nq))
        for i, steps in visited.items():
            cut = states[row, head, 2 * i : 2 * i + 2].reshape(2, nk, 2)
            live = [j for j in range(nk) if cut[:, j].any()]
            work = [step for step in steps if step[3] != DEAD]
            assert [j for j, *_ in work] == live
            assert [sum(step[n] for step in steps) for n in (1, 2)] == [1, 1]
            assert steps[0][1]
            assert steps[max(len(live), 1) - 1][2]
            for j, _, _, _, word in work:
                assert tile_list(int(word), 4) == tuple(cut[:, j].reshape(-1))


def test_steps_of_traced_masks():
    """Made by JAX they are the same, with room for every pair of blocks."""
    random = np.random.default_rng(0)
    states = random.choice([DEAD, DEAD, FULL, 2], (2, 3, 8, 10))
    plan = schedule(states, GRAIN, np)
    traced = schedule(jnp.asarray(states), GRAIN, jnp)
    assert int(traced.length) == plan.length
    np.testing.assert_array_equal(traced.steps[..., : plan.length], plan.steps)
    np.testing.assert_array_equal(traced.tiles[..., : plan.length], plan.tiles)


def test_patterns_of_a_causal_mask():
    """A diagonal block has one pattern: live below the diagonal, partial on it."""
    rules = Rules(4096, 4096, True, None, None, np.zeros(1, np.int32))
    (word,) = patterns(rules, Grain(512, 512, 256, 256))
    assert tile_list(word, 4) == (2, 0, 1, 2)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_heuristic_fits(case):
    """On every chip; and every candidate is a legal size."""
    _, heads, queries, _ = case.shapes[0]
    problem = blocks.Problem(
        case.batch, heads, case.kv_heads, queries, case.keys, case.head_dim, case.value_dim, case.dtype, lists=8
    )
    for chip in CHIPS.values():
        for asked in (problem, replace(problem, dtype="float32")):
            chosen = blocks.heuristic(asked, chip)
            assert chosen == chosen.fit(asked)
            assert blocks.vmem_bytes(asked, chosen) <= tuned.budget(chip)
            assert blocks.smem_bytes(asked, chosen) <= chip.smem // 2
        assert blocks.heuristic(problem, chip) in blocks.candidates(problem, chip)
