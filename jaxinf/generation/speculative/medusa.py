"""Medusa: heads on the target's latest feature draft several tokens at once (Cai et al. 2024, arXiv:2401.10774)."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.cache import Cache
from jaxinf.generation.speculative.drafter import MOST_NODES, Draft, Drafter, Verified, View, check_nodes
from jaxinf.models import CausalLM
from jaxinf.models.drafting import MedusaHeads, fingerprint
from pallas_kernels.errors import InputError
from sharding import split_axis

Paths = tuple[tuple[int, ...], ...]
"""A tree whose node is a path from the root: at each step the rank of a candidate, 0 the likeliest. Parents stand
before their children."""


def chain_paths(length: int) -> Paths:
    """The likeliest candidates one after another."""
    return tuple((0,) * n for n in range(1, length + 1))


def best_paths(ranks: Sequence[Sequence[float]], nodes: int = MOST_NODES) -> Paths:
    """The tree of so many nodes that is expected to have the longest accepted branch (section 2.3.3).

    Args:
      ranks: `ranks[s][r]`, how often the candidate of rank r of step s is right, the ones before being right; of a
        path the product is the chance that it is accepted. Nodes are taken by it, the likeliest first.
    """
    check_nodes("nodes", nodes)

    def entry(path: tuple[int, ...], chance: float):
        return -chance * ranks[len(path) - 1][path[-1]], path, chance

    chosen: list[tuple[int, ...]] = []
    waiting = [entry((0,), 1.0)]
    while waiting and len(chosen) < nodes:
        loss, path, before = heapq.heappop(waiting)
        chosen.append(path)
        if path[-1] + 1 < len(ranks[len(path) - 1]):
            heapq.heappush(waiting, entry((*path[:-1], path[-1] + 1), before))
        if len(path) < len(ranks):
            heapq.heappush(waiting, entry((*path, 0), -loss))
    return tuple(sorted(chosen, key=lambda path: (len(path), path)))


def expected_tokens(ranks: Sequence[Sequence[float]], paths: Paths) -> float:
    """Tokens of a pass that verifies this tree, the target's own among them, if steps are independent."""
    return 1 + sum(float(np.prod([ranks[s][r] for s, r in enumerate(path)])) for path in paths)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Medusa(Drafter):
    """A tree of the heads' likeliest tokens, of the same shape in every pass.

    The state: `[B, d_model]`, the feature before each row's latest token.

    paths: static, the tree's nodes. target: static, fingerprint of the model that the heads are for; None: any.
    """

    heads: MedusaHeads
    paths: Paths = dataclasses.field(default=chain_paths(4), metadata=dict(static=True))
    target: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    reads_hidden = True

    @classmethod
    def of(
        cls, heads: MedusaHeads, ranks: Sequence[Sequence[float]] = (), tokens: int = MOST_NODES, **options: Any
    ) -> Medusa:
        """The best tree of so many tokens by measured agreement (see `best_paths`); without that, a chain."""
        check_nodes("draft_tokens", tokens)
        chain = chain_paths(min(tokens, heads.spec.heads))
        return cls(heads, best_paths(ranks[: heads.spec.heads], tokens) if ranks else chain, **options)

    @property
    def nodes(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        return max(map(len, self.paths))

    @property
    def chain(self) -> bool:
        return self.paths == chain_paths(len(self.paths))

    def check(self, target: CausalLM) -> None:
        check_nodes("nodes of the tree", len(self.paths))
        for i, path in enumerate(self.paths):
            if not path or min(path) < 0 or path[:-1] not in ((), *self.paths[:i]) or path in self.paths[:i]:
                raise InputError(
                    f"paths={self.paths} must name every node once and after its parent, unlike {path}"
                )
        if self.depth > self.heads.spec.heads:
            raise InputError(f"a tree of depth {self.depth} needs as many heads; there are {self.heads.spec.heads}")
        check_made_for(self.target, self.heads.spec.d_model, target)

    def init(self, target: CausalLM, batch: int, tokens: int) -> jax.Array:
        return jnp.zeros((batch, target.spec.d_model), target.dtype)

    def read(self, target, state: jax.Array, tokens, counts, hidden, *, fresh: bool) -> jax.Array:
        last = jnp.maximum(counts - 1, 0)
        return _kept(state, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], counts)

    def draft(self, target: CausalLM, state: jax.Array, view: View) -> tuple[Draft, jax.Array, Cache]:
        logits = target.logits(self.heads(state)[: self.depth])
        widths = [1 + max(path[s] for path in self.paths if len(path) > s) for s in range(self.depth)]
        ids = [split_axis.top_k(logits[s], width)[1] for s, width in enumerate(widths)]
        tokens = jnp.stack([ids[len(path) - 1][:, path[-1]] for path in self.paths], axis=1)
        if self.chain:
            return Draft(tokens), state, view.cache
        numbers = {path: i + 1 for i, path in enumerate(self.paths)} | {(): 0}
        parents = jnp.asarray([numbers[path[:-1]] for path in self.paths], jnp.int32)
        return Draft(tokens, parents=jnp.broadcast_to(parents, tokens.shape)), state, view.cache

    def commit(self, target: CausalLM, state: jax.Array, verified: Verified) -> jax.Array:
        last = jnp.take_along_axis(verified.path, jnp.maximum(verified.counts - 1, 0)[:, None], axis=1)
        return _kept(state, jnp.take_along_axis(verified.hidden, last[:, :, None], axis=1)[:, 0], verified.counts)


def check_made_for(made_for: str | None, d_model: int, target: CausalLM) -> None:
    """Raises InputError unless heads with these features, for the model of this fingerprint, fit `target`."""
    if d_model != target.spec.d_model:
        raise InputError(
            f"the heads are for features of d_model={d_model}, but the target has {target.spec.d_model}"
        )
    if made_for is not None and made_for != (found := fingerprint(target)):
        raise InputError(
            f"the heads were trained for another model (of fingerprint {made_for[:12]}, where this one's is "
            f"{found[:12]}): take heads for this one, or train some with `jaxinf train-drafter`"
        )


def _kept(state: jax.Array, new: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.where((counts > 0)[:, None], new.astype(state.dtype), state)
