"""A smaller model that writes a tree (SpecInfer: Miao et al. 2023, arXiv:2305.09781)."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache import Cache
from jaxinf.generation.sampling import Context, adjust, process
from jaxinf.generation.speculative.by_model import ByModel
from jaxinf.generation.speculative.drafter import (
    MOST_NODES,
    Draft,
    Verified,
    View,
    ancestors,
    check_nodes,
    repeated,
    with_token,
)
from jaxinf.generation.speculative.writing import read_on
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError
from sharding import split_axis


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftTree(ByModel):
    """Each node of level l has `branches[l]` children: at temperature 0
    the likeliest tokens, else as many independent draws, which may be equal.

    The draft model reads the tree so far once a level, so a draft takes as many of its passes as there are levels.

    branches: static, of at most 15 nodes in all.
    """

    branches: tuple[int, ...] = dataclasses.field(default=(3, 1, 1, 1), metadata=dict(static=True))

    @property
    def parents(self) -> tuple[int, ...]:
        """Of the nodes 1..N, level after level."""
        found: list[int] = []
        level = range(1)
        for width in self.branches:
            found += [node for node in level for _ in range(width)]
            level = range(level.stop, 1 + len(found))
        return tuple(found)

    @property
    def nodes(self) -> int:
        return sum(itertools.accumulate(self.branches, operator.mul))

    @property
    def depth(self) -> int:
        return len(self.branches)

    @property
    def chain(self) -> bool:
        return all(width == 1 for width in self.branches)

    @property
    def draws(self) -> bool:
        return True

    def check(self, target: CausalLM) -> None:
        if not self.branches:
            raise InputError("branches=() must have a level or more")
        for width in self.branches:
            check_nodes("a level of branches", width, min(MOST_NODES, target.spec.vocab))
        if self.nodes > MOST_NODES:
            raise InputError(
                f"branches={self.branches} makes a tree of {self.nodes} nodes; a pass takes {MOST_NODES}: take "
                "fewer children"
            )
        super().check(target)

    def draft(self, target: CausalLM, state: Cache, view: View) -> tuple[Draft, Cache, Cache]:
        batch = view.tokens.shape[0]
        parents = jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), (batch, self.nodes))
        mask = ancestors(parents)
        last, cache = read_on(self.model, state, view)
        logits, before = last[:, None], jnp.where(view.active, view.lengths, cache.lengths)
        tokens, seen, probs = [view.tokens], [view.seen], []
        level = range(1)
        for depth, width in enumerate(self.branches):
            if depth:
                # Together with the latest token: the root, without which `Cache.commit` knows no branch.
                whole = cache.roll_back(before)
                counts = jnp.where(view.active, level.stop, 0)
                hidden, after, _ = self.model.hidden(
                    jnp.stack(tokens, axis=1), whole, counts=counts, tree=mask[:, : level.stop, : level.stop]
                )
                assert after is not None
                logits, cache = self.model.logits(hidden[:, level.start :]), after
            drafted, q = self._children(view, logits, depth, tokens[level.start :], seen[level.start :])
            for i in range(len(level) * width):
                tokens.append(drafted[:, i])
                seen.append(with_token(seen[level[i // width]], drafted[:, i]))
            probs.append(q)
            level = range(level.stop, len(tokens))
        draft = Draft(
            jnp.stack(tokens[1:], axis=1),
            parents=None if self.chain else parents,
            probs=jnp.concatenate(probs, axis=1) if view.samples else None,
        )
        return draft, cache.roll_back(before), view.cache

    def _children(
        self, view: View, logits: jax.Array, depth: int, tokens: list[jax.Array], seen: list[Any]
    ) -> tuple[jax.Array, Any]:
        """Those of the n nodes of a level, whose logits are float32 `[B, n, V]`: `(tokens int32 [B, n * width],
        probs float32 [B, n * width, V] or None)`."""
        (batch, count, entries), width = logits.shape, self.branches[depth]
        first = 1 + sum(itertools.accumulate(self.branches[:depth], operator.mul))
        controls, emitted = repeated(view.controls, count), jnp.repeat(view.emitted, count) + depth
        behind = None if seen[0] is None else jnp.stack(seen, axis=1).reshape(batch * count, -1)
        context = Context(jnp.stack(tokens, axis=1).reshape(-1), emitted, behind, view.vocab)
        flat = logits.reshape(batch * count, entries)
        likely = adjust(flat, controls, context, view.processors).reshape(logits.shape)
        best = split_axis.top_k(likely, width)[1].reshape(batch, -1)
        temperature = view.controls.temperature
        if temperature is None:
            return best, None
        x = process(flat, controls, context=context, processors=view.processors).reshape(logits.shape)
        rows = dataclasses.replace(
            view, seeds=jnp.repeat(view.seeds, count * width), emitted=jnp.repeat(view.emitted, count * width)
        )
        each = jnp.repeat(x, width, axis=1)
        nodes = jnp.tile(first + jnp.arange(count * width), batch)
        drawn = rows.draw(each.reshape(-1, entries), nodes).reshape(batch, -1)
        # A row of temperature 0 is given its candidates, each as if drawn from a distribution of its own.
        cold = (temperature == 0)[:, None]
        place = split_axis.first_entry(x) + jnp.arange(entries)
        given = (best[:, :, None] == place).astype(jnp.float32)
        q = jnp.where(cold[:, :, None], given, jnp.repeat(split_axis.softmax(x), width, axis=1))
        return jnp.where(cold, best, drawn), q

    def commit(self, target: CausalLM, state: Cache, verified: Verified) -> Cache:
        if verified.draft is None:
            return state
        # The last level has been written, not read.
        return state.commit(verified.path, jnp.minimum(verified.counts, self.depth))
