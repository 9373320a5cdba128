"""What a drafter is, what it proposes, and what it learns of the verdict."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinf.cache import Cache
from jaxinf.cache.base import DECODE_TOKENS
from jaxinf.generation.sampling import Context, Controls, Processor, process, row_keys
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError
from sharding import split_axis
from sharding.collectives import part, size

MOST_NODES = DECODE_TOKENS - 1
"""Drafted tokens of a pass at most: with the latest token they are what the decode kernel takes."""

_DRAWS = 1
"""Drafters draw node t of a pass with `fold_in(key of the pass, _DRAWS + 2 t)`; odd numbers are theirs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """Tokens that may come next: N nodes of a tree whose root, node 0, is each row's latest token.

    tokens: int32 `[B, N]`, of the nodes 1..N.
    counts: int32 `[B]`, how many of them are meant, the first ones; None: all.
    parents: int32 `[B, N]`, the node that each follows, before it in order; -1: never accepted. None: each follows
      the one before (a chain).
    sees: bool `[B, T, T]`, T = N + 1: node t sees node t' in the target's pass; a node stands as many places after
      the root as it sees others. None: its ancestors and itself.
    probs: float32 `[B, N, V]`, the distribution that each token was drawn from, independently of its siblings;
      None: tokens are given, not drawn. On a mesh, a chip's part of V.
    """

    tokens: jax.Array
    counts: jax.Array | None = None
    parents: jax.Array | None = None
    sees: jax.Array | None = None
    probs: jax.Array | None = None

    @property
    def meant(self) -> jax.Array:
        """bool `[B, N]`."""
        batch, nodes = self.tokens.shape
        if self.counts is None:
            return jnp.ones((batch, nodes), bool)
        return jnp.arange(nodes) < self.counts[:, None]

    @property
    def follows(self) -> jax.Array:
        """`parents`, a chain's written out, -1 where a node is not meant."""
        parents = jnp.arange(self.tokens.shape[1])[None] if self.parents is None else self.parents
        return jnp.where(self.meant, parents, -1)

    @property
    def mask(self) -> jax.Array | None:
        """`sees`, or what follows from `parents`; None for a chain."""
        if self.sees is not None or self.parents is None:
            return self.sees
        return ancestors(self.parents)

    @property
    def depths(self) -> jax.Array:
        """int32 `[B, T]`, how far each node stands after the root, node 0."""
        batch, nodes = self.tokens.shape
        mask = self.mask
        if mask is None:
            return jnp.broadcast_to(jnp.arange(nodes + 1, dtype=jnp.int32), (batch, nodes + 1))
        return jnp.sum(mask, -1, dtype=jnp.int32) - 1


def ancestors(parents: jax.Array) -> jax.Array:
    """int32 `[B, N]` -> bool `[B, T, T]`: each node's ancestors and itself. One without a parent sees the root."""
    batch, nodes = parents.shape
    rows = [jnp.zeros((batch, nodes + 1), bool).at[:, 0].set(True)]
    for t in range(1, nodes + 1):
        known = jnp.stack(rows, 1)  # [B, t, T]
        above = jnp.clip(parents[:, t - 1], 0, t - 1)
        rows.append(jnp.take_along_axis(known, above[:, None, None], 1)[:, 0].at[:, t].set(True))
    return jnp.stack(rows, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """The rows at the beginning of a pass, as a drafter sees them.

    cache: the target's, without each row's latest token. tokens: int32 `[B]`, the latest ones.
    emitted: int32 `[B]`, new tokens so far. active: bool `[B]`, rows that go on.
    history: int32 `[B, S]`, prompt and output; row b's are the first `lengths[b] + 1`, the latest the last of them.
    length: int32 scalar, at least 1, how many tokens in a row are worth drafting; trees may ignore it.
    seeds: uint32 `[B]`. seen: bool `[B, V]` or None. controls: of the target. vocab, processors: static.
    """

    cache: Cache
    tokens: jax.Array
    emitted: jax.Array
    active: jax.Array
    history: jax.Array
    length: jax.Array
    seeds: jax.Array
    controls: Controls
    seen: jax.Array | None = None
    vocab: int | None = field(default=None, metadata=dict(static=True))
    processors: tuple[Processor, ...] = field(default=(), metadata=dict(static=True))

    @property
    def lengths(self) -> jax.Array:
        """int32 `[B]`, tokens before each row's latest one."""
        return self.cache.lengths

    @property
    def samples(self) -> bool:
        """Static: whether any row has a temperature."""
        return self.controls.temperature is not None

    def tail(self, starts: jax.Array, width: int) -> jax.Array:
        """int32 `[B, width]`: the history from `starts` int32 `[B]` on; of no meaning past its end."""
        at = jnp.clip(starts[:, None] + jnp.arange(width), 0, self.history.shape[1] - 1)
        return jnp.take_along_axis(self.history, at, axis=1)

    def processed(
        self, logits: jax.Array, tokens: jax.Array, ahead: jax.Array | int, seen: jax.Array | None
    ) -> jax.Array:
        """The log-distribution, not normalised, that the rows' settings make of `logits [B, V]`, which come after
        `tokens` int32 `[B]` and `ahead` drafted ones."""
        context = Context(tokens, self.emitted + ahead, seen, self.vocab)
        return process(logits, self.controls, context=context, processors=self.processors)

    def draw(self, processed: jax.Array, node: jax.Array | int) -> jax.Array:
        """int32 `[B]` drawn from `softmax(processed)`; `node` 1..N: which of the pass."""
        keys = pass_keys(self.seeds, self.emitted, _DRAWS + 2 * node)
        return categorical(keys, processed)


def pass_keys(seeds: jax.Array, emitted: jax.Array, number: jax.Array | int) -> jax.Array:
    """Keys `[B]` of a pass that begins after `emitted` tokens; no two passes of a row begin there. number: a
    scalar, or one a row."""
    keys = row_keys(seeds, emitted)
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))


def categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """int32 `[B]` drawn from `softmax(logits [B, V])`, as `jaxinf.generation.sample` draws."""
    entries = logits.shape[1] * size(split_axis.AXIS)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (entries,), jnp.float32))(keys)
    noise = part(noise, split_axis.AXIS, 1)
    return split_axis.argmax(jax.lax.optimization_barrier(logits + noise))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verified:
    """What became of a pass.

    draft: as it was verified; None: a plain pass, of the latest token alone.
    path: int32 `[B, P]`, nodes along the accepted branch, the root first. counts: int32 `[B]`, how many of them
      count, which is the number of emitted tokens; 0 in rows that had finished.
    tokens: int32 `[B, P]`, the token that the target put after each of them: those emitted.
    choices: int32 `[B, T]`, what the target would put after every node; None where candidates were drawn.
    hidden: `[B, T, d_model]`, the target's final hidden states of all nodes.
    cache, history: of the rows, after the pass. starts: int32 `[B]`, tokens in the cache before it.
    """

    draft: Draft | None
    path: jax.Array
    counts: jax.Array
    tokens: jax.Array
    choices: jax.Array | None
    hidden: jax.Array
    cache: Cache
    history: jax.Array
    starts: jax.Array

    @property
    def lengths(self) -> jax.Array:
        """int32 `[B]`: tokens before each row's latest one, after the pass."""
        return self.cache.lengths


class Drafter(abc.ABC):
    """Proposes tokens. A pytree: weights are its data, settings are static; what changes is in a state of its own.

    nodes: N, tokens of a draft. depth: the longest branch.
    """

    exact: ClassVar[bool] = True
    """Whether the output is the target's: False of those that accept more than the target would."""
    reads_hidden: ClassVar[bool] = False
    """Whether `read` needs the target's hidden states."""

    @property
    @abc.abstractmethod
    def nodes(self) -> int: ...

    @property
    def depth(self) -> int:
        return self.nodes

    @property
    def chain(self) -> bool:
        """Whether drafts are chains: trees move keys within the target's cache."""
        return True

    @property
    def draws(self) -> bool:
        """Whether drafts report `probs` where rows are sampled."""
        return False

    @property
    def steps(self) -> bool:
        """Whether a shorter draft costs less to make (`View.length`)."""
        return False

    @property
    def free(self) -> bool:
        """Whether `draft` costs next to nothing and changes neither state nor cache: it is then made in every pass,
        and one without tokens is not verified."""
        return False

    @property
    def rule(self) -> Callable[..., Any] | None:
        """How drafts are judged, called as those of `accept`; None: by whether they have `probs`, both of which
        are exact."""
        return None

    @property
    def context(self) -> int | None:
        """Tokens that a row may have, latest drafts included; None: any."""
        return None

    @abc.abstractmethod
    def init(self, target: CausalLM, batch: int, tokens: int) -> Any:
        """The state of `batch` rows (each chip's, on a mesh) that will hold at most `tokens` tokens."""

    def read(
        self, target: CausalLM, state: Any, tokens: jax.Array, counts: jax.Array, hidden: jax.Array, *, fresh: bool
    ) -> Any:
        """The state after a piece of the prompts: int32 `[B, T]`, of which row b's first `counts[b]` are real, and
        the target's hidden states of them. fresh: static; the first piece."""
        return state

    @abc.abstractmethod
    def draft(self, target: CausalLM, state: Any, view: View) -> tuple[Draft, Any, Cache]:
        """`(draft, the state after, the target's cache after)`: a drafter that runs the target itself uses its
        cache and leaves the lengths as they were."""

    def commit(self, target: CausalLM, state: Any, verified: Verified) -> Any:
        """The state after a pass, plain ones included; only rows with `verified.counts > 0` have changed."""
        return state

    def on(self, mesh: Mesh) -> Self:
        """This drafter for a target on `mesh`; weights that are not placed on it are copied to all its chips."""
        return self

    def check(self, target: CausalLM) -> None:  # noqa: B027
        """Raises InputError if this cannot draft for `target`."""


def check_nodes(name: str, value: int, most: int = MOST_NODES) -> None:
    """Raises InputError unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"{name}={value!r} must be a whole number from 1 to {most}")


def repeated(controls: Controls, times: int) -> Controls:
    """The controls of rows that each stand `times` times, one after another."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), controls)


def with_token(seen: jax.Array | None, tokens: jax.Array) -> jax.Array | None:
    """`seen` bool `[B, V]` with `tokens` int32 `[B]`."""
    if seen is None:
        return None
    own = split_axis.own_entries(tokens, seen.shape[1])
    return seen.at[jnp.arange(tokens.shape[0]), own].set(True, mode="drop")
