"""Which drafted tokens stand: pure functions of the target's logits and the draft.

Two rules keep the target's distribution exactly, `by_equality` and `by_rejection`.

`by_equality`: candidates are given. The target draws after every node, with the key that plain decoding would use
there, and a candidate stands if it equals the draw. So each token is the one plain decoding would have written, for
the same seed; a candidate x stands with its probability p(x), which is what rejection sampling grants a point mass.

`by_rejection`: candidates x were drawn from q. x stands with probability min(1, p(x) / q(x)); where it falls,
p becomes norm(max(p - q, 0)), by which the next sibling is judged, or from which the token is drawn (Leviathan et
al. 2023, arXiv:2211.17192, section 2.3; Chen et al. 2023, arXiv:2302.01318, algorithm 2; with siblings: Miao et al.
2023, arXiv:2305.09781, section 4.3).

`by_threshold` does not: a candidate stands if the target finds it likely enough (Kim et al. 2023,
arXiv:2302.07863).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinf.generation.sampling import Context, Controls, Processor, adjust, process, row_keys, sample
from jaxinf.generation.speculative.drafter import Draft, categorical, pass_keys, repeated
from sharding import split_axis

_JUDGES = 2
"""Node t of a pass is judged with `fold_in(key of the pass, _JUDGES + 2 t)`; even numbers are the judge's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accepted:
    """path: int32 `[B, P]`, nodes from the root down, 0 past its end. counts: int32 `[B]`, nodes on it, at least 1.
    tokens: int32 `[B, P]`, what follows each of them. choices: as in `Verified`."""

    path: jax.Array
    counts: jax.Array
    tokens: jax.Array
    choices: jax.Array | None = None


@dataclass(frozen=True)
class Judge:
    """What tokens are judged by, while tracing: the target's settings, and where the rows are.

    emitted: int32 `[B]`. seeds: uint32 `[B]`. latest: int32 `[B]`. controls, processors: of the request.
    seen, vocab: as in `Context`.
    """

    emitted: jax.Array
    seeds: jax.Array
    latest: jax.Array
    controls: Controls
    seen: jax.Array | None = None
    vocab: int | None = None
    processors: Sequence[Processor] = ()

    def _nodes(self, draft: Draft, logits: jax.Array) -> tuple[jax.Array, Controls, Context]:
        """Logits, controls and contexts of all nodes of all rows, `[B * T, ...]`."""
        batch, nodes = logits.shape[:2]
        tokens = jnp.concatenate([self.latest[:, None], draft.tokens], axis=1)
        emitted = self.emitted[:, None] + draft.depths
        seen = self.seen
        if seen is not None:
            mask = draft.mask
            if mask is None:
                mask = jnp.broadcast_to(jnp.tri(nodes, dtype=bool), (batch, nodes, nodes))
            own = split_axis.own_entries(tokens, seen.shape[1])
            own = jnp.where(mask, own[:, None], seen.shape[1])  # [B, T, T]: the tokens that each node sees
            rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(nodes)[None, :, None]
            seen = jnp.broadcast_to(seen[:, None], (batch, nodes, seen.shape[1]))
            seen = seen.at[rows, columns, own].set(True, mode="drop").reshape(batch * nodes, -1)
        flat = logits.reshape(batch * nodes, -1)
        return (
            flat,
            repeated(self.controls, nodes),
            Context(tokens.reshape(-1), emitted.reshape(-1), seen, self.vocab),
        )

    def choices(self, draft: Draft, logits: jax.Array) -> jax.Array:
        """int32 `[B, T]`: what plain decoding would draw after each node."""
        flat, controls, context = self._nodes(draft, logits)
        keys = row_keys(jnp.repeat(self.seeds, logits.shape[1]), context.emitted)
        drawn = sample(flat, controls, keys, context=context, processors=self.processors)
        return drawn.reshape(logits.shape[:2])

    def adjusted(self, draft: Draft, logits: jax.Array) -> jax.Array:
        """float32 `[B, T, V]`: logits after what acts at temperature 0 too."""
        flat, controls, context = self._nodes(draft, logits)
        return adjust(flat, controls, context, self.processors).reshape(logits.shape)

    def distributions(self, draft: Draft, logits: jax.Array) -> jax.Array:
        """float32 `[B, T, V]`: the probabilities that plain decoding would draw with."""
        flat, controls, context = self._nodes(draft, logits)
        x = process(flat, controls, context=context, processors=self.processors)
        return split_axis.softmax(x).reshape(logits.shape)


def by_equality(judge: Judge, draft: Draft, logits: jax.Array, depth: int) -> Accepted:
    """The branch that follows the target's own draws.

    Args:
      logits: float32 `[B, T, V]`, the target's after each node.
      depth: static, P - 1, the longest branch.
    """
    choices = judge.choices(draft, logits)

    def fits(follows: jax.Array, current: jax.Array) -> jax.Array:
        wanted = jnp.take_along_axis(choices, current[:, None], 1)
        return (follows == current[:, None]) & (draft.tokens == wanted)

    return _along(fits, draft, choices, depth)


def by_threshold(judge: Judge, draft: Draft, logits: jax.Array, depth: int, *, distance: float) -> Accepted:
    """Not exact. A candidate stands while -log p of it under the target, before temperature and truncation, is at
    most `distance`, in nats; where the branch ends the target writes what plain decoding would.

    That is the cross entropy between the draft's choice and the target's distribution (Kim et al. 2023, section
    3.4). Of several candidates the first that stands is followed. Other arguments as for `by_equality`.
    """
    choices = judge.choices(draft, logits)
    scores = split_axis.log_softmax(judge.adjusted(draft, logits))
    above = jnp.take_along_axis(scores, jnp.maximum(draft.follows, 0)[:, :, None], axis=1)
    likely = split_axis.take(above, draft.tokens) >= -distance
    accepted = _along(lambda follows, current: (follows == current[:, None]) & likely, draft, choices, depth)
    # Emitted are the candidates themselves, and the target's choice after the last.
    after = jnp.roll(accepted.path, -1, axis=1)
    drafted = jnp.take_along_axis(draft.tokens, jnp.maximum(after - 1, 0), axis=1)
    inner = jnp.arange(depth + 1) < accepted.counts[:, None] - 1
    return dataclasses.replace(accepted, tokens=jnp.where(inner, drafted, accepted.tokens))


def _along(
    fits: Callable[[jax.Array, jax.Array], jax.Array], draft: Draft, choices: jax.Array, depth: int
) -> Accepted:
    """The branch of nodes that fit. fits: `(draft.follows, the node so far int32 [B]) -> bool [B, N]`."""
    follows = draft.follows
    current = jnp.zeros(choices.shape[:1], jnp.int32)
    counts, alive, path = jnp.ones_like(current), jnp.ones(current.shape, bool), [current]
    for _ in range(depth):
        next = fits(follows, current) & alive[:, None]
        alive = jnp.any(next, axis=1)
        current = jnp.where(alive, jnp.argmax(next, axis=1).astype(jnp.int32) + 1, 0)
        counts = counts + alive
        path.append(current)
    nodes = jnp.stack(path, axis=1)
    return Accepted(nodes, counts, jnp.take_along_axis(choices, nodes, 1), choices)


def by_rejection(judge: Judge, draft: Draft, logits: jax.Array, depth: int) -> Accepted:
    """The branch that rejection sampling leaves; the draft reports `probs`. Arguments as for `by_equality`."""
    assert draft.probs is not None
    batch, nodes = draft.tokens.shape
    target = judge.distributions(draft, logits)
    follows, depths = draft.follows, draft.depths
    p, current, ends = target[:, 0], jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    path = jnp.zeros((batch, depth + 1), jnp.int32)
    tokens = jnp.zeros((batch, depth + 1), jnp.int32)
    place = jnp.arange(depth + 1)
    for t in range(1, nodes + 1):
        token, q = draft.tokens[:, t - 1], draft.probs[:, t - 1]
        judged = follows[:, t - 1] == current
        keys = pass_keys(judge.seeds, judge.emitted, _JUDGES + 2 * t)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
        # p > u q, so that a token with p = 0 falls whatever u is.
        stands = judged & (split_axis.take(p, token) > uniform * split_axis.take(q, token))
        falls = judged & ~stands
        p = jnp.where(stands[:, None], target[:, t], jnp.where(falls[:, None], residual(p, q), p))
        here = (place == depths[:, t, None]) & stands[:, None]
        path = jnp.where(here, t, path)
        tokens = jnp.where((place == depths[:, t, None] - 1) & stands[:, None], token[:, None], tokens)
        current, ends = jnp.where(stands, t, current), jnp.where(stands, depths[:, t], ends)
    keys = row_keys(judge.seeds, judge.emitted + ends)
    last = categorical(keys, jnp.log(p))
    tokens = jnp.where(place == ends[:, None], last[:, None], tokens)
    return Accepted(path, ends + 1, tokens)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """`norm(max(p - q, 0))`, float32 `[B, V]`; p where nothing is left, which rounding alone can bring about."""
    left = jnp.maximum(p - q, 0.0)
    total = split_axis.total(left)[:, None]
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1.0), p)
