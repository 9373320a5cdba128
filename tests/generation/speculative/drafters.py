"""Drafters for the proofs: every one there is, by name, and doubles that draft trees in the plainest ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import whole

from jaxinf.generation.speculative import (
    Datastore,
    Draft,
    Drafter,
    DraftModel,
    DraftTree,
    Eagle,
    EagleTree,
    Lookahead,
    Medusa,
    PaSS,
    PromptLookup,
    Retrieval,
    SelfSpeculative,
    View,
)
from jaxinf.generation.speculative.drafter import with_token
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM
from jaxinf.models.drafting import AheadSpec, AheadTokens, EagleHead, EagleSpec, MedusaHeads, MedusaSpec
from sharding import split_axis

TREE = (0, 0, 0, 1, 1, 2, 4)
"""Parents of the nodes 1..7: three children of the root, and a branch of three tokens."""
CHAIN = (0, 1, 2)


def static(**options) -> Any:
    return dataclasses.field(metadata=dict(static=True), **options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shaped(Drafter):
    """Drafts of one shape. parents: static, of the nodes 1..N, each before its children."""

    parents: tuple[int, ...] = static()

    @property
    def nodes(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> list[int]:
        found = [0]
        for parent in self.parents:
            found.append(found[parent] + 1)
        return found

    @property
    def depth(self) -> int:
        return max(self.depths)

    @property
    def chain(self) -> bool:
        return self.parents == tuple(range(self.nodes))

    def init(self, target, batch, tokens):
        return ()

    def shaped(self, tokens: list[jax.Array], probs: list[jax.Array] | None) -> Draft:
        drafted = jnp.stack(tokens, axis=1)
        parents = None
        if not self.chain:
            # Behind a barrier: of large batches XLA would compute the masks while compiling, which takes seconds.
            parents = jax.lax.optimization_barrier(jnp.asarray(self.parents, jnp.int32))
            parents = jnp.broadcast_to(parents, drafted.shape)
        return Draft(drafted, parents=parents, probs=None if probs is None else jnp.stack(probs, axis=1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableTree(Shaped):
    """Given candidates: the j-th child of a node is the j-th guess at what follows its token.

    guesses: int32 `[V, K]`.
    """

    guesses: jax.Array

    def draft(self, target: CausalLM, state: Any, view: View):
        tokens = [view.tokens]
        for t, parent in enumerate(self.parents):
            rank = self.parents[:t].count(parent)
            tokens.append(self.guesses[tokens[parent], rank])
        return self.shaped(tokens[1:], None), state, view.cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledTree(Shaped):
    """Candidates drawn, each independently, from what the rows' settings make of `logits[its parent's token]`.

    logits: float32 `[V, V]`. power, flat: what is told is q^power, normalised, mixed with so much of the uniform
    distribution: a fault, unless they are 1 and 0.
    """

    logits: jax.Array
    power: jax.Array | float = 1.0
    flat: jax.Array | float = 0.0

    @property
    def draws(self) -> bool:
        return True

    def told(self, q: jax.Array) -> jax.Array:
        bent = q**self.power
        bent = (1 - self.flat) * bent / split_axis.total(bent)[:, None] + self.flat / q.shape[1]
        return jnp.where((self.power == 1.0) & (self.flat == 0.0), q, bent)

    def draft(self, target: CausalLM, state: Any, view: View):
        tokens, seen, probs = [view.tokens], [view.seen], []
        for t, parent in enumerate(self.parents):
            x = view.processed(self.logits[tokens[parent]], tokens[parent], self.depths[parent], seen[parent])
            if view.samples:
                token = view.draw(x, t + 1)
                probs.append(self.told(split_axis.softmax(x)))
            else:
                token = split_axis.argmax(x)
            tokens.append(token)
            seen.append(with_token(seen[parent], token))
        return self.shaped(tokens[1:], probs if view.samples else None), state, view.cache


def guessed(target: CausalLM) -> jax.Array:
    """float32 `[V, V]`: the target's logits after each token alone, a poor guess at what it says later."""
    return whole(target, jnp.arange(target.spec.vocab, dtype=jnp.int32)[:, None])[:, 0]


def nearly(target: CausalLM, seed: int, *, noise: float = 0.08) -> CausalLM:
    """A model that often, not always, agrees with the target."""
    graph, state = nnx.split(target)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + noise * jnp.std(x) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


def table_tree(target: CausalLM, seed: int, parents: tuple[int, ...] = TREE) -> TableTree:
    _, guesses = jax.lax.top_k(guessed(target), min(4, target.spec.vocab))
    return TableTree(parents, guesses.astype(jnp.int32))


def sampled_tree(target: CausalLM, seed: int, parents: tuple[int, ...] = TREE) -> SampledTree:
    return SampledTree(parents, guessed(target))


def medusa(target: CausalLM, seed: int, depth: int = 3) -> Medusa:
    heads = MedusaHeads(MedusaSpec(target.spec.d_model, heads=depth), rngs=nnx.Rngs(seed))
    paths = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    return Medusa(heads, tuple(path for path in paths if len(path) <= depth))


def eagle_head(target: CausalLM, seed: int) -> EagleHead:
    """Untrained, but of the token more than of the feature: its guesses stand now and then."""
    width = target.spec.d_model
    layer = LayerSpec(AttentionSpec(2, 1, 8, rope=RopeSpec(8)), FFNSpec(16))
    head = EagleHead(EagleSpec(width, layer), rngs=nnx.Rngs(seed))
    fuse = head.modules[0].fuse.kernel
    fuse[...] = jnp.concatenate([0.1 * fuse[...][:width], jnp.eye(width)])
    return head


def retrieval(target: CausalLM, seed: int, depth: int = 3) -> Retrieval:
    """From text in which every token is followed by a guess at what the target says after it."""
    guesses = np.asarray(jnp.argmax(guessed(target), axis=1))
    rows = [np.arange(len(guesses))]
    for _ in range(5):
        rows.append(guesses[rows[-1]])
    store = Datastore.build(np.stack(rows, axis=1), len(guesses))
    return Retrieval.of(store, tokens=5, longest=3, longest_draft=depth)


def cut(parents: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The nodes at the beginning of a tree that are no deeper than that."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return tuple(p for p, d in zip(parents, depths[1:], strict=True) if d <= depth)


DRAFTERS: dict[str, Callable[..., Drafter]] = {
    "draft model": lambda target, seed, depth=3: DraftModel(nearly(target, seed), tokens=depth),
    "draft tree": lambda target, seed, depth=3: DraftTree(nearly(target, seed), (2, *[1] * (depth - 1))),
    "prompt lookup": lambda target, seed, depth=3: PromptLookup(tokens=depth),
    "retrieval": retrieval,
    "layers left out": lambda target, seed, depth=3: SelfSpeculative((target.spec.depth - 1,), tokens=depth),
    "lookahead": lambda target, seed, depth=2: Lookahead(depth, 3, 3, buckets=32),
    "look-ahead tokens": lambda target, seed, depth=3: PaSS(
        AheadTokens(AheadSpec(target.spec.d_model, depth - 1), rngs=nnx.Rngs(seed))
    ),
    "medusa": medusa,
    "eagle": lambda target, seed, depth=3: Eagle(eagle_head(target, seed), tokens=depth),
    "eagle tree": lambda target, seed, depth=3: EagleTree(
        eagle_head(target, seed), tokens=2 * depth, levels=depth, width=2
    ),
    "given tree": lambda target, seed, depth=3: table_tree(target, seed, cut(TREE, depth)),
    "drawn tree": lambda target, seed, depth=3: sampled_tree(target, seed, cut(TREE, depth)),
    "drawn chain": lambda target, seed, depth=3: sampled_tree(target, seed, cut(CHAIN, depth)),
}
"""What drafts for a target, by name. seed: of weights, where the drafter has its own. depth: the longest branch."""


def fits(name: str, target: CausalLM) -> bool:
    """Whether a drafter can be made for a target: of a single layer none can be left out."""
    return name != "layers left out" or target.spec.depth > 1
