"""What is done to a block of pages that has arrived, before scores are computed with it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.blocks import Blocks, Problem
from pallas_kernels.ragged_paged_attention.pages import LANES
from pallas_kernels.ragged_paged_attention.walk import Piece

SCALE_ROWS, SCALES_TOGETHER = 32, 32  # rows of 128 scales a head, and of all heads, that are spread side by side


def clean(facts: Problem, blocks: Blocks, piece: Piece, key: jax.Array, pages: Any) -> None:
    """Zeros where no query may look: memory there may hold nan, and 0 * nan is nan."""
    if pages.dtype == jnp.int8:
        return
    page, count = facts.page, blocks.pages
    part = max(blocks.keys, blocks.keys_one)
    end = lax.div(jnp.clip(piece.high - key, 0, count * page) + (part - 1), part) * (part // page)

    def one(index, _):
        first = key + index * page
        outside = (first >= piece.high) | (first + page <= piece.low)
        edge = (first + page > piece.high) | (first < piece.low)

        @pl.when(outside)
        def _():
            pages[index] = jnp.zeros(pages.shape[1:], pages.dtype)

        @pl.when(edge & jnp.logical_not(outside))
        def _():
            at = first + lax.broadcasted_iota(jnp.int32, pages.shape[1:], 1)
            seen = (at >= piece.low) & (at < piece.high)
            pages[index] = jnp.where(seen, pages[index].astype(jnp.float32), 0.0).astype(pages.dtype)

        return 0

    @pl.when((key + end * page > piece.high) | (key < piece.low))
    def _():
        lax.fori_loop(0, end, one, 0)


def spread_scales(facts: Problem, blocks: Blocks, piece: Piece, key: jax.Array, scales: Any, spread: Any) -> None:
    """From page by page, heads within, to head by head, 128 consecutive keys a row; 0 for keys not seen."""
    page = facts.page
    together = max(1, LANES // page)  # pages that share 128 lanes
    per_page = max(1, page // LANES)  # rows that a page fills
    part = max(blocks.keys, blocks.keys_one)
    total = blocks.pages * page
    end = lax.div(jnp.clip(piece.high - key, 0, total) + (part - 1), part) * (part // LANES)
    rows = max(n for n in range(1, SCALE_ROWS + 1) if part // LANES % n == 0 and n % per_page == 0)  # of a step
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def lanes(index, start):
        """Lanes start..start+127 of a page's scales, as many as there are."""
        size = min(LANES, scales.shape[-1] - start)
        x = scales[index, :, start : start + size]
        return x if size == LANES else jnp.concatenate([x, jnp.zeros((1, LANES - size), x.dtype)], axis=1)

    def row_of(step, nth, head):
        """128 scales of a head: the step's `nth` row."""
        index, within = divmod(nth, per_page)
        index = (step * (rows // per_page) + index) * together
        x = lanes(index, (head * page + within * LANES) // LANES * LANES)
        start = head * page % LANES
        x = pltpu.roll(x, LANES - start, 1) if start else x
        for k in range(1, together):
            other = lanes(index + k, head * page // LANES * LANES)
            move = (k * page - start) % LANES
            x = jnp.where(lane >= k * page, pltpu.roll(other, move, 1) if move else other, x)
        at = key + (step * rows + nth) * LANES + lane
        return jnp.where((at >= piece.low) & (at < piece.high), x, 0.0)

    def some_rows(step, _):
        # Several before any is stored, so that one's shuffles are another's waiting.
        wanted = [(head, nth) for head in range(spread.shape[0]) for nth in range(rows)]
        for first in range(0, len(wanted), SCALES_TOGETHER):
            some = wanted[first : first + SCALES_TOGETHER]
            found = [row_of(step, nth, head) for head, nth in some]
            for (head, nth), x in zip(some, found, strict=True):
                spread[head, pl.ds(step * rows + nth, 1), :] = x
        return 0

    lax.fori_loop(0, lax.div(end, rows), some_rows, 0)
