"""Drafts looked up in a datastore of text (REST: He et al. 2023, arXiv:2311.08252)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.speculative.datastore import END, Datastore, Encoder, tokenizer_hash
from jaxinf.generation.speculative.drafter import Draft, Drafter, View, check_nodes
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError

LONGER = 2.0
"""What the occurrences of a suffix weigh together, in those of one a token shorter."""
FURTHER = 0.6
"""What a token counts, of the one before it: below 1, so that a node comes after its parent."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Retrieval(Drafter):
    """What followed the last tokens where they stand in some text: the most frequent branches of a trie.

    The suffixes of the row's tokens are looked up, by bisection in the text's suffix array on the device. Of what
    follows their occurrences (`samples` of each, evenly spread over the sorted ones) the `tokens` prefixes of most
    weight are the draft, a tree. The paper takes the longest suffix that occurs; here shorter ones have their say
    too, half as much for each token less, which fills the tree where longer ones are rare.

    text, suffixes: int32 `[M]`, of a `Datastore`. vocab: static, its vocabulary; None: not checked.
    tokens: static, nodes of a draft. longest_draft: static, its branches' length at most.
    longest, shortest: static, how many last tokens are compared, and how many have to agree.
    samples: static. order: static, of the datastore.
    """

    text: jax.Array
    suffixes: jax.Array
    vocab: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    tokens: int = dataclasses.field(default=8, metadata=dict(static=True))
    longest_draft: int = dataclasses.field(default=6, metadata=dict(static=True))
    longest: int = dataclasses.field(default=6, metadata=dict(static=True))
    shortest: int = dataclasses.field(default=1, metadata=dict(static=True))
    samples: int = dataclasses.field(default=8, metadata=dict(static=True))
    order: int = dataclasses.field(default=32, metadata=dict(static=True))

    @classmethod
    def of(cls, store: Datastore, **options: Any) -> Retrieval:
        """From a datastore. options: the static fields."""
        return cls(
            jnp.asarray(store.tokens), jnp.asarray(store.suffixes), store.vocab, order=store.order, **options
        )

    @classmethod
    def load(cls, path: str | Path, tokenizer: Encoder | None = None, **options: Any) -> Retrieval:
        """From the file of a datastore. tokenizer: the target's.

        Raises:
          CheckpointError: as `Datastore.load`.
          InputError: the store was made with another tokenizer.
        """
        store = Datastore.load(path)
        if tokenizer is not None and store.tokenizer not in (None, tokenizer_hash(tokenizer)):
            raise InputError(
                f"{path} was made with another tokenizer than the target's, so its tokens mean other text: build "
                "one with `jaxinf datastore --model` and the target's name"
            )
        return cls.of(store, **options)

    @property
    def nodes(self) -> int:
        return self.tokens

    @property
    def depth(self) -> int:
        return min(self.longest_draft, self.tokens)

    @property
    def chain(self) -> bool:
        return self.tokens == 1

    def check(self, target: CausalLM) -> None:
        check_nodes("draft_tokens", self.tokens)
        check_nodes("longest_draft", self.longest_draft)
        check_nodes("longest", self.longest, 64)
        check_nodes("shortest", self.shortest, 64)
        check_nodes("samples", self.samples, 256)
        if self.shortest > self.longest:
            raise InputError(f"shortest={self.shortest} must be at most longest={self.longest}")
        if self.longest + self.longest_draft > self.order:
            raise InputError(
                f"longest={self.longest} + longest_draft={self.longest_draft} must be at most order={self.order}, "
                "by which the datastore is sorted"
            )
        if self.vocab is not None and self.vocab != target.spec.vocab:
            raise InputError(
                f"the datastore has a vocabulary of {self.vocab} tokens, but the target's has {target.spec.vocab}: "
                "build one with its tokenizer"
            )

    def init(self, target: CausalLM, batch: int, tokens: int) -> tuple[()]:
        return ()

    def draft(self, target: CausalLM, state: Any, view: View) -> tuple[Draft, Any, Cache]:
        known = view.lengths + 1
        have = jnp.minimum(known, self.longest)
        last = view.tail(jnp.maximum(known - self.longest, 0), self.longest)
        last = jnp.take_along_axis(last, (jnp.arange(self.longest) + have[:, None]) % self.longest, axis=1)
        tokens, parents = trie(*self._follows(last, have), self.tokens)
        return Draft(tokens, parents=None if self.chain else parents), state, view.cache

    def _follows(self, last: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What follows the suffixes of `last` int32 `[B, longest]`, of which the last `known` int32 `[B]` are real:
        `(int32 [B, S, depth], -1 past an end, weights float32 [B, S])`, S of all lengths together."""
        first, count, lengths = self._ranges(last, known)
        many, i = count[:, :, None], jnp.arange(self.samples)
        # Of sorted occurrences an even selection has what follows as often as all of them.
        spread = many // self.samples * i + many % self.samples * i // self.samples
        few = many <= self.samples
        chosen = first[:, :, None] + jnp.where(few, i, spread)
        there = jnp.where(few, i < many, True)
        share = 1.0 / jnp.maximum(jnp.minimum(many, self.samples), 1)
        weights = jnp.where(there, share * LONGER ** lengths[:, None].astype(jnp.float32), 0.0)
        at = self._place(chosen)[..., None] + lengths[:, None, None] + jnp.arange(self.depth)
        follows = jnp.where(there[..., None], self._token(at), END)
        batch = last.shape[0]
        return follows.reshape(batch, -1, self.depth), weights.reshape(batch, -1)

    def _ranges(self, last: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where those suffixes stand among the sorted ones: `(first place int32 [B, Q], places int32 [B, Q], tokens
        of the suffix int32 [Q])`."""
        lengths = jnp.arange(self.longest, self.shortest - 1, -1, dtype=jnp.int32)
        place = jnp.arange(self.longest, dtype=jnp.int32)
        # Query j is the last lengths[j] tokens, from the left.
        at = jnp.clip(self.longest - lengths[:, None] + place, 0, self.longest - 1)
        queries = last[:, at]  # [B, Q, longest]
        compared = place < lengths[:, None]
        size = self.text.shape[0]

        def bisect(passes_equal: bool) -> jax.Array:
            """int32 `[B, Q]`: the first suffix not below the query, or above it."""

            def halve(_, ends):
                low, high = ends
                middle = low + (high - low) // 2
                here = self._token(self._place(middle)[:, :, None] + place)
                differs = compared & (here != queries)
                where = jnp.argmax(differs, axis=2)[:, :, None]
                below = jnp.take_along_axis(here < queries, where, 2)[:, :, 0]
                equal = ~jnp.any(differs, axis=2)
                left = jnp.where(equal, passes_equal, below) & (low < high)
                return jnp.where(left, middle + 1, low), jnp.where(left | (low >= high), high, middle)

            start = jnp.zeros(queries.shape[:2], jnp.int32)
            ends = (start, jnp.full_like(start, size))
            return jax.lax.fori_loop(0, size.bit_length(), halve, ends)[0]

        first, after = bisect(False), bisect(True)
        return first, jnp.where(lengths <= known[:, None], after - first, 0), lengths

    def _place(self, index: jax.Array) -> jax.Array:
        return self.suffixes[jnp.clip(index, 0, self.suffixes.shape[0] - 1)]

    def _token(self, at: jax.Array) -> jax.Array:
        size = self.text.shape[0]
        return jnp.where(at < size, self.text[jnp.minimum(at, size - 1)], END)


def trie(follows: jax.Array, weights: jax.Array, nodes: int) -> tuple[jax.Array, jax.Array]:
    """The prefixes of some continuations that have the most weight, a token more counting `FURTHER` times as much.

    Args:
      follows: int32 `[B, S, D]`; of each what comes from its first -1 on does not count.
      weights: float32 `[B, S]`, at least 0; a prefix has that of all continuations that begin with it.

    Returns:
      `(tokens int32 [B, nodes], parents int32 [B, nodes])` as in `Draft`, the heaviest first; -1: no more.
    """
    batch, samples, depth = follows.shape
    real = jnp.cumprod(follows != END, axis=2).astype(bool) & (weights > 0)[:, :, None]
    alike = jnp.cumprod(follows[:, :, None] == follows[:, None], axis=3).astype(bool)  # [B, S, S, D]
    alike = alike & real[:, :, None] & real[:, None]
    first = jnp.argmax(alike, axis=2)  # [B, S, D]: the first sample with the same prefix
    weight = jnp.sum(jnp.where(alike, weights[:, None, :, None], 0.0), axis=2)
    distinct = real & (first == jnp.arange(samples)[:, None])
    score = jnp.where(distinct, weight * FURTHER ** jnp.arange(depth), 0.0).reshape(batch, -1)
    best, at = jax.lax.top_k(score, min(nodes, samples * depth))
    tokens = jnp.take_along_axis(follows.reshape(batch, -1), at, axis=1)
    # A prefix that is a token shorter weighs more, so it has been chosen, and before.
    owner = jnp.take_along_axis(jnp.roll(first, 1, axis=2).reshape(batch, -1), at, axis=1)
    wanted = owner * depth + at % depth - 1
    same = wanted[:, :, None] == at[:, None]
    parents = jnp.where(at % depth == 0, 0, 1 + jnp.argmax(same, axis=2)).astype(jnp.int32)
    there = best > 0
    pad = ((0, 0), (0, nodes - tokens.shape[1]))
    tokens = jnp.pad(jnp.where(there, tokens, 0), pad)
    return tokens, jnp.pad(jnp.where(there, parents, -1), pad, constant_values=-1)
