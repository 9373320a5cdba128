"""What the inputs of a block's matrices are like, and the block's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.cache import Step
from jaxinf.layers import Block, Linear
from jaxinf.layers.moe import Experts, MoE
from jaxinf.quant import QTensor
from pallas_kernels import grouped_matmul
from pallas_kernels.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stats:
    """Of the inputs x of a matrix with K rows; leading axes count experts, each with the tokens that it served.

    Attributes:
      count: float32 `[...]`, tokens.
      largest: float32 `[..., K]`, max |x| of a channel.
      total: float32 `[..., K]`, sum of |x|.
      squares: float32 `[..., K]`, sum of x^2.
      gram: float32 `[..., K, K]`, sum of x^T x; None: not asked for.
    """

    count: jax.Array
    largest: jax.Array
    total: jax.Array
    squares: jax.Array
    gram: jax.Array | None = None

    @classmethod
    def of(cls, x: jax.Array, gram: bool) -> Stats:
        """`x [..., K]`, a token a row."""
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        size = jnp.abs(x)
        moments = jnp.matmul(x.T, x, precision="highest") if gram else None
        count = jnp.float32(x.shape[0])
        return cls(count, jnp.max(size, 0), jnp.sum(size, 0), jnp.sum(x * x, 0), moments)

    @classmethod
    def of_groups(cls, rows: jax.Array, sizes: jax.Array, owner: jax.Array, gram: bool) -> Stats:
        """`rows [M, K]` sorted by expert, `sizes` int32 `[E]`, `owner` int32 `[M]`."""
        groups = sizes.shape[0]
        real = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
        x = jnp.where(real[:, None], rows.astype(jnp.float32), 0)
        size = jnp.abs(x)
        moments = None
        if gram:
            empty = jnp.zeros((groups, x.shape[1], x.shape[1]))
            # The gradient of rows times a matrix each is those rows times what comes back.
            _, pull = jax.vjp(lambda w: grouped_matmul(x, w, sizes), empty)
            (moments,) = pull(x)
        by_group: Callable[[jax.Array], jax.Array] = partial(
            jax.ops.segment_sum, segment_ids=owner, num_segments=groups
        )
        largest = jnp.zeros((groups, x.shape[1])).at[owner].max(size)
        return cls(sizes.astype(jnp.float32), largest, by_group(size), by_group(x * x), moments)

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.count + other.count,
            jnp.maximum(self.largest, other.largest),
            self.total + other.total,
            self.squares + other.squares,
            None if self.gram is None or other.gram is None else self.gram + other.gram,
        )

    @property
    def mean(self) -> jax.Array:
        """float32 `[..., K]`, mean |x|; 0 where there were no tokens."""
        return self.total / jnp.maximum(self.count, 1)[..., None]

    def together(self) -> Stats:
        """Of all experts' tokens; without gram."""
        if self.count.ndim == 0:
            return self
        parts = self.largest.max(0), self.total.sum(0), self.squares.sum(0)
        return Stats(self.count.sum(), *parts)


class _Observed:
    """Stands where a `Linear` did and notes what it is given."""

    def __init__(self, linear: Linear, note: Callable[[Any], None]):
        self._linear, self._note = linear, note

    def __call__(self, x: jax.Array, **more: Any) -> jax.Array:
        self._note(x)
        return self._linear(x, **more)


class _ObservedExperts:
    """Stands where `Experts` did."""

    def __init__(self, experts: Experts, note: Callable[[str, Any], None]):
        self._experts, self._note = experts, note

    @property
    def added(self) -> jax.Array | None:
        return self._experts.added

    def __call__(self, rows: jax.Array, sizes: jax.Array, owner: jax.Array) -> jax.Array:
        self._note("up", (rows, sizes, owner))
        if self._experts.gate is not None:
            self._note("gate", (rows, sizes, owner))
        self._note("down", (self._experts.hidden(rows, sizes, owner), sizes, owner))
        return self._experts(rows, sizes, owner)


def observe(block: Block, x: jax.Array, *, gram: bool) -> tuple[jax.Array, dict[tuple[str, ...], Stats]]:
    """`x [B, T, d]` -> the block's output, and what its quantisable matrices are given.

    The keys are names in the block, together those that have the same input: ("attention.query", "attention.key",
    "attention.value").
    """
    graph, state = nnx.split(block)
    out, found = _observe(graph, state, x, gram)
    return out, {tuple(names.split("|")[1:]): stats for names, stats in found.items()}


@partial(jax.jit, static_argnums=(0, 3))
def _observe(graph, state, x: jax.Array, gram: bool) -> tuple[jax.Array, dict[str, Stats]]:
    block = nnx.merge(graph, state)
    inputs: list[tuple[Any, list[str]]] = []

    def note(name: str, given: Any) -> None:
        array = given[0] if isinstance(given, tuple) else given
        for seen, names in inputs:
            if (seen[0] if isinstance(seen, tuple) else seen) is array:
                names.append(name)
                return
        inputs.append((given, [name]))

    for path, module in list(nnx.iter_modules(block)):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and module.kernel.get_metadata().get("quantizable", False):
            _replace(block, path, _Observed(module, partial(note, name)))
        elif isinstance(module, Experts):
            _replace(
                block, path, _ObservedExperts(module, lambda part, given, at=name: note(f"{at}.{part}", given))
            )
    out, _, _ = block(x, _step(x), None)
    # jit sorts the keys: the numbers keep them in the order in which the block computes.
    return out, {
        "|".join([f"{i:03}", *names]): Stats.of_groups(x[0], x[1], x[2], gram)
        if isinstance(x, tuple)
        else Stats.of(x, gram)
        for i, (x, names) in enumerate(inputs)
    }


def _step(x: jax.Array) -> Step:
    return Step(jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]))


def _replace(block: Block, path: tuple[Any, ...], by: Any) -> None:
    *parents, last = path
    module: Any = block
    for name in parents:
        module = getattr(module, str(name))
    setattr(module, str(last), by)


def statistics(block: Block, hidden: Sequence[np.ndarray], *, gram: bool, at: str = "") -> dict[str, Stats]:
    """What a block's matrices are given, by their names in it; those with the same input share theirs.

    Args:
      hidden: the block's inputs, some rows at a time, `[batch, length, d]` each.
      gram: whether moments are wanted.
      at: the block's name, for messages.

    Raises:
      InputError: inputs that are NaN or infinite.
    """
    total: dict[tuple[str, ...], Stats] = {}
    for x in hidden:
        _, found = observe(block, jnp.asarray(x), gram=gram)
        total = {names: _sum(total[names], new) for names, new in found.items()} if total else found
    check_inputs(total, at)
    return {name: stats for names, stats in total.items() for name in names}


@partial(jax.jit, donate_argnums=0)
def _sum(a: Stats, b: Stats) -> Stats:
    return a + b


def run(block: Block, x: jax.Array, routing: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """`x [B, T, d]` -> the block's output, and a mixture's router's logits `[B, T, experts]`; None: no mixture.

    routing: logits to be taken in their place.
    """
    graph, state = nnx.split(block)
    return _run(graph, state, x, routing)


@partial(jax.jit, static_argnums=0)
def _run(graph, state, x: jax.Array, routing: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    block = nnx.merge(graph, state)
    noted: list[jax.Array] = []
    if isinstance(block.ffn, MoE):
        router: Any = block.ffn.router

        def route(h: jax.Array) -> jax.Array:
            noted.append(router(h) if routing is None else routing)
            return noted[-1]

        _replace(block, ("ffn", "router"), route)
    out, _, _ = block(x, _step(x), None)
    return out, noted[0] if noted else None


def check_inputs(found: Mapping[tuple[str, ...], Stats], at: str) -> None:
    """
    Raises:
      InputError: inputs that are not finite; names the matrix that they meet, in the block called `at`.
    """
    for names, stats in found.items():
        if not bool(jnp.isfinite(stats.total).all() & jnp.isfinite(stats.largest).all()):
            raise InputError(
                f"the inputs of {at}{names[0]} are NaN or infinite on the calibration text; "
                "look at the model's weights, or calibrate it in a wider dtype"
            )


def check_weight(value: Any, name: str) -> None:
    """
    Raises:
      InputError: a weight that is NaN or infinite, or quantised already.
    """
    if isinstance(value, QTensor):
        raise InputError("the model is quantised already; take the original")
    if not bool(jnp.isfinite(value).all()):
        raise InputError(f"{name} holds NaN or infinite weights, which cannot be quantised; look at its source")
