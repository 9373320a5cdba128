"""Lookahead decoding: Jacobi iterations on what is far ahead give n-grams, which are then verified (Fu et al. 2024,
arXiv:2402.02057)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import MOST_NODES, Draft, Drafter, Verified, View, check_nodes
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError

_NONE = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guesses:
    """The state of B rows.

    window: int32 `[B, N, W]`, guesses of the last N passes: of level l and column c at l + c + 1 after the latest
      token; -1: none yet.
    pool: int32 `[B, buckets, ways, N + 1]`, n-grams by their first token, the latest first; -1: none.
    """

    window: jax.Array
    pool: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookahead(Drafter):
    """No model, no text: one pass verifies n-grams of the pool and goes on with a window of guesses beside them.

    The window has `columns` of `tokens` guesses, each from another pass, of which a column with what the target
    says after its last is an n-gram of `tokens + 1` (the paper's N is `tokens + 1`, W `columns`, G `branches`). A
    guess sees those of the first level up to its own column, and its own column's before it; none is ever accepted
    where it stands. `branches` n-grams that begin with the latest token are the draft. What the target says is
    drawn with the keys of plain decoding, also in the window, so sampled rows profit too.

    tokens, columns, branches: static; (columns + branches) tokens are at most 15 nodes.
    buckets, ways: static, of the pool: the n-grams of so many first tokens, so many each.
    prompts: static; n-grams of the prompt are in the pool.
    """

    tokens: int = dataclasses.field(default=2, metadata=dict(static=True))
    columns: int = dataclasses.field(default=4, metadata=dict(static=True))
    branches: int = dataclasses.field(default=3, metadata=dict(static=True))
    buckets: int = dataclasses.field(default=1024, metadata=dict(static=True))
    ways: int = dataclasses.field(default=4, metadata=dict(static=True))
    prompts: bool = dataclasses.field(default=True, metadata=dict(static=True))

    @classmethod
    def of(cls, tokens: int = 2, **options: Any) -> Lookahead:
        """As many columns and branches of so many tokens as a pass takes, half of them each."""
        check_nodes("draft_tokens", tokens, MOST_NODES // 2)
        both = MOST_NODES // tokens
        return cls(tokens, both - both // 2, both // 2, **options)

    @property
    def nodes(self) -> int:
        return (self.columns + self.branches) * self.tokens

    @property
    def depth(self) -> int:
        return self.tokens

    @property
    def chain(self) -> bool:
        return False

    def check(self, target: CausalLM) -> None:
        for name in ("tokens", "columns", "branches"):
            check_nodes(name, getattr(self, name))
        for name in ("buckets", "ways"):
            check_nodes(name, getattr(self, name), 1 << 20)
        if self.branches > self.ways:
            raise InputError(
                f"branches={self.branches} must be at most ways={self.ways}, the n-grams that are kept"
            )
        if self.nodes > MOST_NODES:
            raise InputError(
                f"(columns={self.columns} + branches={self.branches}) x tokens={self.tokens} is {self.nodes} "
                f"nodes; a pass takes {MOST_NODES}"
            )

    def init(self, target: CausalLM, batch: int, tokens: int) -> Guesses:
        window = jnp.full((batch, self.tokens, self.columns), _NONE, jnp.int32)
        pool = jnp.full((batch, self.buckets, self.ways, self.tokens + 1), _NONE, jnp.int32)
        return Guesses(window, pool)

    def read(self, target, state: Guesses, tokens, counts, hidden, *, fresh: bool) -> Guesses:
        width = self.tokens + 1
        if not self.prompts or tokens.shape[1] < width:
            return state

        def one(i, pool):
            gram = jax.lax.dynamic_slice_in_dim(tokens, i, width, axis=1)
            return insert(pool, gram, i + width <= counts)

        return dataclasses.replace(state, pool=jax.lax.fori_loop(0, tokens.shape[1] - width + 1, one, state.pool))

    def draft(self, target: CausalLM, state: Guesses, view: View) -> tuple[Draft, Guesses, Cache]:
        batch = view.tokens.shape[0]
        # Places without a guess start with some token of the row's own text.
        some = view.lengths[:, None] + 1
        place = jnp.arange(self.tokens * self.columns, dtype=jnp.int32)
        picked = jnp.take_along_axis(view.history, (view.emitted[:, None] * 31 + place * 17) % some, axis=1)
        window = jnp.where(state.window < 0, picked.reshape(state.window.shape), state.window)
        grams, known = lookup(state.pool, view.tokens)
        grams, known = grams[:, : self.branches, 1:], known[:, : self.branches]
        tokens = jnp.concatenate([window.reshape(batch, -1), grams.reshape(batch, -1)], axis=1)

        guesses, width = self.tokens * self.columns, self.tokens
        chains = guesses + jnp.arange(self.branches * width, dtype=jnp.int32).reshape(-1, width)
        parents = jnp.where(known[:, :, None], chains.at[:, 0].set(0), _NONE).reshape(batch, -1)
        parents = jnp.concatenate([jnp.full((batch, guesses), _NONE), parents], axis=1)
        sees = jnp.broadcast_to(self._sees(), (batch, self.nodes + 1, self.nodes + 1))
        state = dataclasses.replace(state, window=window)
        return Draft(jnp.maximum(tokens, 0), parents=parents, sees=sees), state, view.cache

    def _sees(self) -> np.ndarray:
        """bool `[T, T]`: node 1 + l columns + c is level l of column c; then the branches, each a chain."""
        sees = np.eye(self.nodes + 1, dtype=bool)
        sees[:, 0] = True
        window = 1 + np.arange(self.tokens * self.columns).reshape(self.tokens, self.columns)
        for level in range(self.tokens):
            for column in range(self.columns):
                node = window[level, column]
                sees[node, window[0, : column + 1]] = True
                sees[node, window[: level + 1, column]] = True
        for branch in range(self.branches):
            chain = window.size + 1 + branch * self.tokens + np.arange(self.tokens)
            sees[np.ix_(chain, chain)] |= np.tri(self.tokens, dtype=bool)
        return sees

    def commit(self, target: CausalLM, state: Guesses, verified: Verified) -> Guesses:
        if verified.draft is None or verified.choices is None:
            return state
        rows = verified.counts > 0
        first = 1 + (self.tokens - 1) * self.columns
        new = verified.choices[:, first : first + self.columns]
        grown = jnp.concatenate([state.window, new[:, None]], axis=1)  # [B, N + 1, W]: the columns are n-grams
        pool = state.pool
        for column in range(self.columns):
            pool = insert(pool, grown[:, :, column], rows)
        # A level on; and as many columns as the pass wrote tokens besides its first.
        at = jnp.arange(self.columns) + jnp.maximum(verified.counts - 1, 0)[:, None]
        moved = jnp.take_along_axis(grown[:, 1:], jnp.minimum(at, self.columns - 1)[:, None], axis=2)
        moved = jnp.where((at < self.columns)[:, None], moved, _NONE)
        return Guesses(jnp.where(rows[:, None, None], moved, state.window), pool)


def insert(pool: jax.Array, gram: jax.Array, where: jax.Array) -> jax.Array:
    """`pool [B, buckets, ways, n]` with `gram` int32 `[B, n]` as the latest of its bucket, once, in the rows
    `where` bool `[B]`; the oldest makes room."""
    rows = jnp.arange(pool.shape[0])
    bucket = gram[:, 0] % pool.shape[1]
    old = pool[rows, bucket]  # [B, ways, n]
    same = jnp.all(old == gram[:, None], axis=2)
    last = jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1), pool.shape[2] - 1)
    pushed = jnp.concatenate([gram[:, None], old[:, :-1]], axis=1)
    new = jnp.where(jnp.arange(pool.shape[2])[None, :, None] <= last[:, None, None], pushed, old)
    return pool.at[rows, jnp.where(where, bucket, pool.shape[1])].set(new, mode="drop")


def lookup(pool: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The n-grams that begin with `tokens` int32 `[B]`, latest first: `(int32 [B, ways, n], bool [B, ways])`, of
    which the second says which there are."""
    found = pool[jnp.arange(pool.shape[0]), tokens % pool.shape[1]]
    known = found[:, :, 0] == tokens[:, None]
    order = jnp.argsort(~known, axis=1, stable=True)  # others may share the bucket
    return jnp.take_along_axis(found, order[:, :, None], axis=1), jnp.take_along_axis(known, order, axis=1)
