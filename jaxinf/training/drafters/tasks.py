"""What the heads learn, each as a pure function of a flat dict of parameters."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxinf.models import CausalLM
from jaxinf.models.drafting import EagleHead, EagleSpec, MedusaHeads, MedusaSpec
from jaxinf.training.drafters.unrolled import unrolled
from jaxinf.training.snapshots import Params

Report = dict[str, jax.Array]


@dataclass(frozen=True)
class Task(abc.ABC):
    """A module to be trained for a frozen target; hashable, since programs are compiled for it."""

    @abc.abstractmethod
    def build(self, seed: int) -> nnx.Module:
        """A fresh module in float32."""

    @property
    @abc.abstractmethod
    def depth(self) -> int:
        """Tokens that a draft may have."""

    @abc.abstractmethod
    def drafts(self, head: Any, target: CausalLM, rows: jax.Array, steps: int) -> list[jax.Array]:
        """The features that heads make at every place of a text, given its true tokens.

        Args:
          rows: int32 `[B, T + 1]`. steps: static, of a draft.

        Returns:
          For each step s `[B, T, d]`: column c stands for the feature at c + 1 of the draft that began at c - s, so
          columns before s have no meaning.
        """

    @abc.abstractmethod
    def loss(self, head: Any, target: CausalLM, rows: jax.Array, steps: int) -> tuple[jax.Array, Report]:
        """`(what is minimised, figures to report)` of int32 rows `[B, T + 1]` and drafts of `steps`, static."""

    def graph(self) -> tuple[Any, tuple[str, ...], Any]:
        """The module's structure, its parameters' paths, and the structure of its state."""
        graph, state = nnx.split(nnx.eval_shape(lambda: self.build(0)))
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        return graph, tuple(_name(path) for path, _ in leaves), tree

    def init(self, seed: int) -> Params:
        """Fresh float32 parameters, path to array."""
        return dict(zip(self.graph()[1], jax.tree.leaves(nnx.split(self.build(seed))[1]), strict=True))

    def head(self, params: Params) -> Any:
        """The module with these parameters (inside `jit` too)."""
        graph, paths, tree = self.graph()
        return nnx.merge(graph, jax.tree.unflatten(tree, [params[path] for path in paths]))


def _name(path) -> str:
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
    return "/".join(str(key) for key in keys if key is not None)


@dataclass(frozen=True)
class MedusaTask(Task):
    """Cross entropy of head i with the target's own distribution one place earlier, weighed by `decay ** i`.

    The paper's loss (section 2.2.1) with the target's distribution in place of the text, as where it distils
    (section 2.3.2).
    """

    spec: MedusaSpec
    decay: float = 0.8

    def build(self, seed):
        return MedusaHeads(self.spec, rngs=nnx.Rngs(seed))

    @property
    def depth(self):
        return self.spec.heads

    def drafts(self, head, target, rows, steps):
        hidden = _frozen(target, rows)
        # Head s at place c - s, which is where such a draft began.
        return [jnp.roll(x, s, axis=1) for s, x in enumerate(head(hidden)[:steps])]

    def loss(self, head, target, rows, steps):
        hidden = _frozen(target, rows)
        wanted = _following(target, hidden)
        total, report = jnp.float32(0), {}
        for s, x in enumerate(head(hidden)[:steps]):
            entropy, report[f"top1_{s + 1}"] = _against(target, jnp.roll(x, s, axis=1), wanted, s)
            report[f"kl_{s + 1}"] = entropy
            total += self.decay**s * entropy
        return total, report


@dataclass(frozen=True)
class EagleTask(Task):
    """Of every step of a draft: `classes` x cross entropy with the target's distribution + `features` x smooth L1
    (Girshick 2015) between features, weighed by `decay ** s`.

    EAGLE (section 3.2) has 0.1 and 1 and one step. Here a draft's own features go back in for some steps, as they
    will when it runs (see `Unrolled`), so that later places hold.

    draft: steps of a draft that are looked at when it is measured.
    """

    spec: EagleSpec
    classes: float = 1.0
    features: float = 1.0
    decay: float = 0.8
    draft: int = 5

    def build(self, seed):
        return EagleHead(self.spec, rngs=nnx.Rngs(seed))

    @property
    def depth(self):
        return max(self.draft, self.spec.modules)

    def drafts(self, head, target, rows, steps):
        return self._unrolled(head, target, rows, _frozen(target, rows), steps)

    def loss(self, head, target, rows, steps):
        hidden = _frozen(target, rows)
        wanted, true = _following(target, hidden), jnp.roll(hidden, -1, axis=1).astype(jnp.float32)
        total, report = jnp.float32(0), {}
        for s, x in enumerate(self._unrolled(head, target, rows, hidden, steps)):
            entropy, report[f"top1_{s + 1}"] = _against(target, x, wanted, s)
            apart = _mean(jnp.mean(optax.losses.huber_loss(x.astype(jnp.float32), true), -1), s)
            report[f"kl_{s + 1}"], report[f"l1_{s + 1}"] = entropy, apart
            total += self.decay**s * (self.classes * entropy + self.features * apart)
        return total, report

    def _unrolled(self, head: EagleHead, target, rows, hidden, steps: int) -> list[jax.Array]:
        batch, spec = rows.shape[0], head.spec
        given, cache = hidden, unrolled(batch, spec.modules, spec.blocks)
        nothing, out = cache.lengths, []
        for s in range(steps):
            module = min(s, spec.modules - 1)
            x, cache = head(target, given, rows[:, 1:], cache, module=module)
            assert cache is not None
            cache = cache.roll_back(nothing)
            out.append(x)
            given = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return out


def _frozen(target: CausalLM, rows: jax.Array) -> jax.Array:
    """The target's features of all tokens but the last, `[B, T, d]`."""
    return jax.lax.stop_gradient(target.hidden(rows[:, :-1])[0])


Wanted = tuple[jax.Array, jax.Array, jax.Array]


def _following(target: CausalLM, hidden: jax.Array) -> Wanted:
    """What the target says after each column's next token: probabilities `[B, T, V]`, their entropy and most likely
    token `[B, T]`. The last column has none that follows."""
    logits = jax.lax.stop_gradient(target.logits(jnp.roll(hidden, -1, axis=1)))
    scores = jax.nn.log_softmax(logits)
    probs = jnp.exp(scores)
    return probs, -jnp.sum(jnp.where(probs > 0, probs * scores, 0.0), -1), jnp.argmax(logits, -1)


def _against(target: CausalLM, x: jax.Array, wanted: Wanted, step: int) -> tuple[jax.Array, jax.Array]:
    """Kullback-Leibler divergence of a step's drafts from the target (its gradient is that of the cross entropy),
    and how often their most likely token is the target's."""
    probs, entropy, best = wanted
    logits = target.logits(x)
    cross = jax.nn.logsumexp(logits, -1) - jnp.sum(probs * logits, -1)
    hit = jnp.take_along_axis(logits, best[..., None], -1)[..., 0] >= jnp.max(logits, -1)
    return _mean(cross - entropy, step), _mean(hit.astype(jnp.float32), step)


def _mean(x: jax.Array, step: int) -> jax.Array:
    """Over `[B, T]`, without columns that have no draft or nothing to be compared with."""
    return jnp.mean(x[:, step:-1])
