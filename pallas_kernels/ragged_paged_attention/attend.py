"""What the kernel computes with a block of pages: softmax attention that is carried from block to block.

Rows of scores are (query head of the group, token), one matrix a key head. Scores are in powers of two: queries
come multiplied by scale * log2(e). Hidden scores get HIDDEN added, which is further below zero than the least
maximum LOWEST, so that a row without a visible key so far has weights of exactly 0.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import arrived
from pallas_kernels.ragged_paged_attention.blocks import Blocks, Problem
from pallas_kernels.ragged_paged_attention.pages import LANES
from pallas_kernels.ragged_paged_attention.walk import Piece

LOWEST, HIDDEN = -1e30, -2e30
LOG2E = math.log2(math.e)
TOGETHER = 8  # key heads that are computed side by side,
TOGETHER_ROWS = 256  # unless they have more rows than this


class State(NamedTuple):
    """Queries, and the running maximum, sum and weighted values of their rows; leading axes (tile,) key head."""

    q: Any  # [..., K, R, key lanes]
    peak: Any  # float32 [..., K, R, 128], the same in every lane
    total: Any  # float32 [..., K, R, 128], to be summed over lanes
    acc: Any  # float32 [..., K, R, value lanes]

    @staticmethod
    def scratch(lead: tuple[int, ...], facts: Problem) -> "State":
        lane = pltpu.VMEM((*lead, LANES), jnp.float32)
        return State(
            pltpu.VMEM((*lead, facts.key_lanes), facts.compute_dtype),
            lane,
            lane,
            pltpu.VMEM((*lead, facts.value_lanes), jnp.float32),
        )

    def at(self, *index: Any) -> "State":
        return State(*(ref.at[index] for ref in self))


@dataclass(frozen=True)
class Attend:
    """The vector side of the kernel. Fields are references in the kernel's memories, and static facts."""

    facts: Problem
    blocks: Blocks
    scale: float
    softcap: float | None
    left: int | None
    q: Any  # [window, N, D]
    out: Any  # [window, N, Dv]
    lse: Any  # [window, N, 128]
    sinks: Any  # [K, N / K, 128]
    slopes: Any  # [K, N / K, 128]
    scales: Any  # [2 * K, keys / 128, 128]
    wide: Any  # float32 [q_tile, N, lanes], to turn (token, head) into (head, token)
    single: State  # of one token: [K, N / K, ...]
    tile: State  # of tiles of tokens: [tiles, K, N / K * q_tile, ...]

    @property
    def heads(self) -> int:
        return self.facts.heads

    @property
    def groups(self) -> int:
        return self.facts.kv_heads

    @property
    def share(self) -> int:
        return self.heads // self.groups

    def clear(self) -> None:
        """Tokens of no row give 0 and -inf."""
        self.out[...] = jnp.zeros_like(self.out)
        if self.lse is not None:
            self.lse[...] = jnp.full_like(self.lse, -jnp.inf)

    # -- a piece begins

    def begin(self, piece: Piece, begin: jax.Array, one: jax.Array) -> None:
        @pl.when(one)
        def _():
            x = self.queries(self.q[piece.first - begin])
            for head in range(self.groups):
                state = self.single.at(head)
                state.q[...] = x[head * self.share : (head + 1) * self.share].astype(state.q.dtype)
                self.reset(state, head, 1)

        @pl.when(jnp.logical_not(one))
        def _():
            lax.fori_loop(0, self.tiles(piece), lambda tile, _: self.load_tile(tile, piece, begin), 0)

    def tiles(self, piece: Piece) -> jax.Array:
        return lax.div(piece.last - piece.first + (self.blocks.q_tile - 1), self.blocks.q_tile)

    def tile_start(self, tile: jax.Array, piece: Piece, begin: jax.Array) -> jax.Array:
        """Where a tile begins in the window: whole tiles from the piece's first token, if that leaves room."""
        size = self.blocks.q_tile
        return jnp.minimum(piece.first - begin + tile * size, self.blocks.q - size)

    def load_tile(self, tile: jax.Array, piece: Piece, begin: jax.Array) -> int:
        size = self.blocks.q_tile
        lanes = self.facts.key_lanes
        start = self.tile_start(tile, piece, begin)
        x = self.queries(self.q[pl.ds(start, size)])
        position = piece.offset + begin + start + lax.broadcasted_iota(jnp.int32, (size, 1, 1), 0)
        self.wide[:, :, :lanes] = jnp.where(position >= 0, x, 0.0)  # Before the text a query may be nan.
        for head in range(self.heads):
            group, nth = divmod(head, self.share)
            q = self.tile.q.at[tile, group, nth * size : (nth + 1) * size]
            q[...] = self.wide[:, head, :lanes].astype(q.dtype)
        for group in range(self.groups):
            self.reset(self.tile.at(tile, group), group, size)
        return 0

    def queries(self, x: jax.Array) -> jax.Array:
        """float32 queries, scaled, filled up to whole lanes with zeros."""
        x = x.astype(jnp.float32) * (self.scale if self.softcap else self.scale * LOG2E)
        spare = self.facts.key_lanes - x.shape[-1]
        return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], spare), x.dtype)], axis=-1) if spare else x

    def reset(self, state: State, head: int, size: int) -> None:
        first = lax.broadcasted_iota(jnp.int32, state.total.shape, 1) == 0
        if self.sinks is None:
            state.peak[...] = jnp.full(state.peak.shape, LOWEST, jnp.float32)
            state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
        else:
            state.peak[...] = self.by_row(self.sinks[head], size)
            state.total[...] = jnp.where(first, 1.0, 0.0)
        state.acc[...] = jnp.zeros(state.acc.shape, jnp.float32)

    def by_row(self, x: jax.Array, size: int) -> jax.Array:
        """[N / K, 128] for rows (head, token)."""
        if size == 1:
            return x
        return jnp.broadcast_to(x[:, None], (x.shape[0], size, LANES)).reshape(-1, LANES)

    # -- a block of pages

    def block(
        self, piece: Piece, begin: jax.Array, one: jax.Array, key: jax.Array, pages: Any, scales: Any
    ) -> None:
        """key: position of the block's first key; pages [pages, K, page, W], scales [pages, 1, 2 * K * page]."""
        arrived.clean(self.facts, self.blocks, piece, key, pages)
        if scales is not None:
            arrived.spread_scales(self.facts, self.blocks, piece, key, scales, self.scales)

        @pl.when(one)
        def _():
            position = piece.offset + piece.first
            together = min(TOGETHER, self.groups)
            self.parts(
                piece, key, pages, (self.blocks.keys_one, position, position, position, 1), self.single, together
            )

        @pl.when(jnp.logical_not(one))
        def _():
            size = self.blocks.q_tile
            together = max(1, min(TOGETHER, TOGETHER_ROWS // (self.share * size)))

            def each(tile, _):
                first = piece.offset + begin + self.tile_start(tile, piece, begin)
                low = jnp.maximum(first, piece.offset + piece.first)
                high = jnp.minimum(first + size, piece.offset + piece.last) - 1
                facts = (self.blocks.keys, first, low, high, size)
                self.parts(piece, key, pages, facts, self.tile.at(tile), together)
                return 0

            lax.fori_loop(0, self.tiles(piece), each, 0)

    def parts(
        self,
        piece: Piece,
        key: jax.Array,
        pages: Any,
        tokens: tuple[int, jax.Array, jax.Array, jax.Array, int],
        states: State,
        together: int,
    ) -> None:
        """Visits the parts of a block that some tokens see, for all heads.

        tokens: keys of a part, the position of the first token, the least and the largest position whose rows
        matter, and how many tokens there are. together: heads that are computed side by side.
        """
        part, first, low, high, count = tokens
        total = self.blocks.pages * self.facts.page
        end = lax.div(jnp.clip(jnp.minimum(high + 1, piece.high) - key, 0, total) + (part - 1), part)
        start = 0 * end
        if self.left is not None:
            start = lax.div(jnp.clip(low - self.left - key, 0, total), part)
        sets = [range(head, min(head + together, self.groups)) for head in range(0, self.groups, together)]

        def each(nth, _):
            at = pl.multiple_of(nth * part, part)
            whole = key + at + part <= low + 1
            if self.left is not None:
                whole &= key + at >= high - self.left
            if self.slopes is not None:
                whole = jnp.bool_(False)

            def all_heads(masked):
                position = first if masked else None
                if count == 1 or len(sets) == 1:
                    for heads in sets:
                        self.update(
                            [(states.at(head), head) for head in heads], pages, key, at, part, position, count
                        )
                    return

                def some_heads(index, _):
                    heads = [index * together + nth for nth in range(together)]
                    self.update([(states.at(head), head) for head in heads], pages, key, at, part, position, count)
                    return 0

                lax.fori_loop(0, self.groups // together, some_heads, 0)
                if self.groups % together:
                    self.update(
                        [(states.at(head), head) for head in sets[-1]], pages, key, at, part, position, count
                    )

            pl.when(whole)(lambda: all_heads(False))
            pl.when(jnp.logical_not(whole))(lambda: all_heads(True))
            return 0

        lax.fori_loop(start, end, each, 0)

    def update(
        self,
        states: list[tuple[State, Any]],
        pages: Any,
        key: jax.Array,
        at: jax.Array,
        size: int,
        position: jax.Array | None,
        tokens: int,
    ) -> None:
        """Adds keys at..at+size-1 of a block to the rows of some key heads, given as (state, head).

        position: of the rows' first token; None where every row sees every key. tokens: the rows are (head, token),
        so many tokens each. The heads go through each stage together, so that one's waiting is another's work.
        """
        facts = self.facts
        first, count = lax.div(at, facts.page), size // facts.page
        bias = None if position is None else self.bias(key + at, position, (tokens, size))

        def block(head, start, lanes):
            x = pages[pl.ds(first, count), head, :, start : start + lanes]
            return x.reshape(size, lanes).astype(facts.compute_dtype)

        olds = [state.peak[...] for state, _ in states]
        totals = [state.total[...] for state, _ in states]
        scores = []
        for state, head in states:
            s = self.dot(state.q[...], block(head, 0, facts.key_lanes), transpose=True)
            if self.scales is not None:
                s = self.scaled(s, head, at)
            if self.softcap is not None:
                s = (self.softcap * LOG2E) * jnp.tanh(s * (1 / self.softcap))
            if bias is not None:
                s = self.add_bias(s, head, *bias)
            scores.append([s[:, i : i + LANES] for i in range(0, size, LANES)])
        tops = [jnp.max(functools.reduce(jnp.maximum, parts), axis=1, keepdims=True) for parts in scores]
        peaks = [jnp.maximum(old, top) for old, top in zip(olds, tops, strict=True)]
        fades = [jnp.exp2(old - peak) for old, peak in zip(olds, peaks, strict=True)]
        weights = [[jnp.exp2(part - peak) for part in parts] for parts, peak in zip(scores, peaks, strict=True)]
        news = []
        for (_, head), parts in zip(states, weights, strict=True):
            p = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            if self.scales is not None:
                p = self.scaled(p, head if facts.latent else head + self.groups, at)
            v = block(head, facts.value_start, facts.value_lanes)
            news.append(self.dot(p.astype(facts.compute_dtype), v, transpose=False))
        for (state, _), peak, fade, total, parts, new in zip(
            states, peaks, fades, totals, weights, news, strict=True
        ):
            state.peak[...] = peak
            state.total[...] = total * fade + functools.reduce(jnp.add, parts)
            state.acc[...] = state.acc[...] * self.widen(fade, facts.value_lanes) + new

    def bias(self, key: jax.Array, position: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """What is added to hidden scores, and how far (<= 0) a key lies from a query: float32 [tokens, keys]."""
        far = (key - position) + (
            lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
        )
        seen = far <= 0
        if self.left is not None:
            seen &= far >= -self.left
        return jnp.where(seen, 0.0, HIDDEN), far.astype(jnp.float32)

    def add_bias(self, s: jax.Array, head: Any, hidden: jax.Array, far: jax.Array) -> jax.Array:
        tokens, size = hidden.shape
        if self.slopes is not None:
            slope = self.slopes[head][:, :1]
            if tokens == 1:
                return s + slope * far + hidden
            return (s.reshape(self.share, tokens, size) + slope[:, :, None] * far + hidden).reshape(s.shape)
        return s + hidden if tokens == 1 else (s.reshape(self.share, tokens, size) + hidden).reshape(s.shape)

    def scaled(self, x: jax.Array, head: Any, at: jax.Array) -> jax.Array:
        """x [R, size] times the scales of its keys."""
        row = lax.div(at, LANES)
        parts = [
            x[:, i : i + LANES] * self.scales[head, pl.ds(row + i // LANES, 1), :]
            for i in range(0, x.shape[1], LANES)
        ]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def widen(self, x: jax.Array, lanes: int) -> jax.Array:
        """[R, 128], the same in every lane, over more lanes."""
        return x if lanes == LANES else jnp.concatenate([x] * (lanes // LANES), axis=1)

    def dot(self, a: jax.Array, b: jax.Array, *, transpose: bool) -> jax.Array:
        full = self.facts.compute_dtype == jnp.float32
        return lax.dot_general(
            a,
            b,
            (((1,), (1 if transpose else 0,)), ((), ())),
            precision=lax.Precision.HIGHEST if full else None,
            preferred_element_type=jnp.float32,
        )

    # -- a piece ends

    def end(self, piece: Piece, begin: jax.Array, one: jax.Array) -> None:
        @pl.when(one)
        def _():
            at = piece.first - begin
            found = [self.result(self.single.at(head)) for head in range(self.groups)]
            self.out[at] = jnp.concatenate([out for out, _ in found], axis=0).astype(self.out.dtype)
            if self.lse is not None:
                self.lse[at] = jnp.concatenate([lse for _, lse in found], axis=0)

        @pl.when(jnp.logical_not(one))
        def _():
            lax.fori_loop(0, self.tiles(piece), lambda tile, _: self.store_tile(tile, piece, begin), 0)

    def result(self, state: State) -> tuple[jax.Array, jax.Array]:
        """out [R, Dv] and the log-sum-exp [R, 128] of finished rows."""
        facts = self.facts
        total = jnp.sum(state.total[...], axis=1, keepdims=True)
        some = total > 0
        out = state.acc[...] * (1.0 / jnp.where(some, total, 1.0))
        skip = facts.value_skip
        lse = jnp.where(some, state.peak[...] + jnp.log2(jnp.where(some, total, 1.0)), -jnp.inf) * (1 / LOG2E)
        return out[:, skip : skip + facts.value_dim], lse

    def store_tile(self, tile: jax.Array, piece: Piece, begin: jax.Array) -> int:
        size = self.blocks.q_tile
        start = self.tile_start(tile, piece, begin)
        window = pl.ds(start, size)
        for what, target in ((0, self.out), (1, self.lse)):
            if target is None:
                continue
            lanes = target.shape[-1]
            for group in range(self.groups):
                x = self.result(self.tile.at(tile, group))[what]
                for nth in range(self.share):
                    self.wide[:, group * self.share + nth, :lanes] = x[nth * size : (nth + 1) * size]
            at = begin + start + lax.broadcasted_iota(jnp.int32, (size, 1, 1), 0)
            mine = (at >= piece.first) & (at < piece.last)
            new = jnp.where(mine, self.wide[:, :, :lanes], target[window].astype(jnp.float32))
            target[window] = new.astype(target.dtype)
        return 0
