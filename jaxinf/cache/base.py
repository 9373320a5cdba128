"""What a layer's cache is, and what an attention layer tells it."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from jaxinf.cache.store import Store
from pallas_kernels import flash_attention
from sharding import zigzag
from sharding.collectives import size
from sharding.sequence import sequence_attention

Rotate = Callable[[jax.Array, jax.Array], jax.Array]

# Passes of at most this many tokens read the cache with `flash_decode`, longer ones with `flash_attention`.
DECODE_TOKENS = 16


@dataclass(frozen=True)
class AttentionRule:
    """What a layer's attention computes, apart from its keys and values. Lives while tracing only.

    rotate: `(x [B, N, T, D], positions int32 [B, T]) -> x` rotated, or None (no rope).
    window: a query sees this many latest tokens, itself included; None: all.
    scale: multiplies scores; None: D^-0.5.
    softcap: c * tanh(scores / c); None: none.
    sinks: learned logits float32 `[N]` that join the softmax; None: none.
    alibi_slopes: float32 `[N]`; None: none.
    """

    rotate: Rotate | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: jax.Array | None = None
    alibi_slopes: jax.Array | None = None

    def turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.rotate is None else self.rotate(x, positions)

    @property
    def mask(self) -> dict[str, Any]:
        """The keywords that the attention ops take."""
        return dict(
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
        )


@dataclass(frozen=True)
class Step:
    """The tokens of one pass: T columns, of which row b's first `counts[b]` are real, the rest padding.

    positions: int32 `[B, T]`, consecutive in a row; `positions[b, 0]` tokens of row b came before.
    counts: int32 `[B]`, or None: all T.
    fresh: static; nothing came before in any row, so the cache need not be read.
    zigzag: static; the columns are this chip's part of a pass that starts its rows, in the order of
      `sharding.zigzag`; `counts` are of the whole pass.
    tree: bool `[B, T, T]`; the columns are nodes of a tree, and column t sees t' where it is true, besides what
      came before. A node's position is that of its depth; it is stored by its column. None: each sees those before.
    """

    positions: jax.Array
    counts: jax.Array | None = None
    fresh: bool = False
    zigzag: bool = False
    tree: jax.Array | None = None

    @property
    def starts(self) -> jax.Array:
        """Tokens in each row before this pass, int32 `[B]`."""
        return jnp.zeros_like(self.positions[:, 0]) if self.zigzag else self.positions[:, 0]

    @property
    def tokens(self) -> int:
        """Columns of the whole pass, on all chips that it is split over."""
        return self.positions.shape[1] * (size("sequence") if self.zigzag else 1)

    @property
    def totals(self) -> jax.Array:
        """Tokens in each row after this pass, int32 `[B]`."""
        return self.starts + (self.tokens if self.counts is None else self.counts)


def attend_alone(
    q: jax.Array, k: jax.Array, v: jax.Array, step: Step, rule: AttentionRule, *, return_lse: bool = False
) -> Any:
    """What the tokens of a pass that starts its rows see of each other; all are rotated already.

    Returns `out [B, N, T, D]`, or with `return_lse` also the log-sum-exp float32 `[B, N, T]`.
    """
    attend = sequence_attention if step.zigzag else flash_attention
    return attend(q, k, v, lengths=step.counts, return_lse=return_lse, **rule.mask)


def tree_mask(step: Step) -> dict[str, Any]:
    """The keyword by which `flash_decode` learns of a tree."""
    return {} if step.tree is None else dict(ancestor_mask=step.tree)


def to_store(store: Store, k: jax.Array, step: Step, rule: AttentionRule) -> jax.Array:
    """Keys of a pass as a store takes them."""
    return k if store.grouped else rule.turn(k, step.positions)


def as_read(
    store: Store, k: jax.Array, v: jax.Array, step: Step, rule: AttentionRule
) -> tuple[jax.Array, jax.Array]:
    """Keys, rotated, and values of a pass as later passes read them: in fewer bits if the store has fewer."""
    if store.grouped and step.zigzag:  # what is rounded together lies on several chips
        k = zigzag.share(store.rounded_keys(zigzag.whole(k, 2), step.starts, step.totals), 2)
    else:
        k = store.rounded_keys(to_store(store, k, step, rule), step.starts, step.counts)
    return rule.turn(k, step.positions) if store.grouped else k, store.rounded_values(v)


class LayerCache(abc.ABC):
    """Keys and values of one attention layer, or of several stacked along a leading axis.

    A cache is a pytree. It owns attention: `step` stores the new tokens and attends to old and new.
    """

    window = None
    """Tokens that a query sees at most because the cache forgets, or None."""

    @abc.abstractmethod
    def step(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step, rule: AttentionRule, *, layer=None
    ) -> tuple[jax.Array, LayerCache]:
        """Stores `k, v` and returns what `q` sees.

        Args:
          q: `[B, N, T, D]`; k, v: `[B, K, T, D]`; none of them rotated yet.
          step: where the T tokens stand.
          rule: masks, scale and rope of the layer.
          layer: index into a stacked cache (int or int32 scalar); None for a cache of one layer.

        Returns:
          `(out [B, N, T, D], the cache after)`. Columns past a row's count are unspecified and not stored.
        """

    @abc.abstractmethod
    def commit(self, starts: jax.Array, path: jax.Array, counts: jax.Array) -> Self:
        """The cache after a pass over trees, of which one branch stays.

        Args:
          starts: int32 `[B]`, tokens before the pass. path: int32 `[B, P]`, the columns of the branch from the root
            down; path[b, i] is at least i. counts: int32 `[B]`, how many of them stay.

        Raises:
          UnsupportedError: trees were not for this cache.
        """

    @abc.abstractmethod
    def map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> Self:
        """The cache with `change(array, its axis of rows)` in place of every array."""

    def take(self, rows: jax.Array) -> Self:
        """The cache of the rows `rows` int32 `[M]`, in that order, repeats allowed; a copy."""
        return self.map_rows(lambda x, axis: jnp.take(x, rows, axis=axis))

    @property
    @abc.abstractmethod
    def append_limit(self) -> int | None:
        """How many of the latest tokens may be taken back by lowering lengths; None: all."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int | None:
        """Tokens that a row can hold; None: no limit (a window forgets)."""
