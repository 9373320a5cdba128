"""From logits to the next token: what may be asked for, and the distribution that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import InputError
from sharding import split_axis
from sharding.collectives import part, size

_NO_TOKEN = 2**31 - 1
_COLDEST = 1e-30
"""Below it logits of 1e8 would become infinite, and their differences NaN."""
_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    temperature: logits are divided by it; 0: the most likely token, and the next four do not matter.
    top_k: only the k most likely tokens (all that tie with the k-th).
    top_p: only the most likely tokens whose probabilities reach top_p together (Holtzman et al. 2020).
    min_p: only tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024).
    repetition_penalty: logits of tokens already in the prompt or the output are divided by it where positive,
      multiplied where negative (Keskar et al. 2019); acts at temperature 0 too.
    logit_bias: added to the logits of these token ids; acts at temperature 0 too.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        def check(name: str, rule: str, holds: Callable[[Any], bool]) -> None:
            value = getattr(self, name)
            if value is None:
                return
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not holds(value):
                raise InputError(f"{name}={value!r} must be {rule}")

        if self.temperature is None:
            raise InputError("temperature=None must be a finite number of at least 0")
        check("temperature", "a finite number of at least 0", lambda x: x >= 0 and math.isfinite(x))
        check(
            "top_k",
            "a whole number of at least 1 and below 2**31, or None",
            lambda x: 1 <= x < 2**31 and x == int(x),
        )
        check("top_p", "above 0 and at most 1, or None", lambda x: 0 < x <= 1)
        check("min_p", "at least 0 and below 1, or None", lambda x: 0 <= x < 1)
        # By the range of float32, in which it is applied.
        positive = "a finite number above 0, or None"
        check("repetition_penalty", positive, lambda x: _FLOAT32.tiny <= x <= _FLOAT32.max)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < _NO_TOKEN:
                raise InputError(f"logit_bias has the key {token!r}; keys must be token ids")
            if not isinstance(bias, (int, float, np.number)) or math.isnan(bias) or bias == math.inf:
                raise InputError(f"logit_bias[{token}]={bias!r} must be a number below infinity")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """`SamplingParams` of B rows as arrays, so that other values need no new program. None: no row uses it.

    temperature, top_p, min_p, penalty: float32 `[B]`; top_k: int32 `[B]`. bias_ids int32 `[B, K]` and bias
    float32 `[B, K]`: additions to logits; ids past the vocabulary fill up.
    """

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    penalty: jax.Array | None = None
    bias_ids: jax.Array | None = None
    bias: jax.Array | None = None

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Controls:
        """The controls of rows that each have their own parameters."""

        def column(name: str, neutral, dtype, *, sampled: bool = True) -> Any:
            values = [None if sampled and p.greedy else getattr(p, name) for p in params]
            if all(v is None or v == neutral for v in values):
                return None
            return np.asarray([neutral if v is None else v for v in values], dtype)

        width = max(len(p.logit_bias) for p in params)
        ids: Any = None
        bias: Any = None
        if width:
            width = 1 << (width - 1).bit_length()
            ids = np.full((len(params), width), _NO_TOKEN, np.int32)
            bias = np.zeros((len(params), width), np.float32)
            for row, p in enumerate(params):
                ids[row, : len(p.logit_bias)] = list(p.logit_bias)
                bias[row, : len(p.logit_bias)] = list(p.logit_bias.values())
        return cls(
            temperature=column("temperature", 0.0, np.float32),
            top_k=column("top_k", _NO_TOKEN, np.int32),
            top_p=column("top_p", 1.0, np.float32),
            min_p=column("min_p", 0.0, np.float32),
            penalty=column("repetition_penalty", 1.0, np.float32, sampled=False),
            bias_ids=ids,
            bias=bias,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a processor may look at.

    tokens: int32 `[B]`, the token before the one to be chosen. emitted: int32 `[B]`, new tokens so far.
    seen: bool `[B, V]`, tokens of the prompt and the output; None unless the repetition penalty is used.
    vocab: static, V; None: as many as the logits have. A mesh may have padded those.
    """

    tokens: jax.Array
    emitted: jax.Array
    seen: jax.Array | None = None
    vocab: int | None = field(default=None, metadata=dict(static=True))


Processor = Callable[[jax.Array, Context], jax.Array]
"""`(logits float32 [B, V], context) -> logits`; pure and traceable. A different function is a new program."""


def process(
    logits: jax.Array,
    controls: Controls,
    *,
    context: Context | None = None,
    processors: Sequence[Processor] = (),
) -> jax.Array:
    """The logits of the distribution that `sample` draws from, float32 `[B, V]`, -inf where ruled out.

    In the order of Hugging Face: repetition penalty, bias, processors, temperature, top-k, top-p, min-p. A row
    of temperature 0 has its most likely token alone.

    Args:
      logits: `[B, V]`.
      context: needed by processors and by the penalty.
    """
    x = adjust(logits, controls, context, processors)
    if controls.temperature is None:
        return _only(greedy(x), x)
    cold = (controls.temperature == 0)[:, None]
    warm = _warp(x, controls, jnp.where(cold, 1.0, controls.temperature[:, None]))
    return jnp.where(cold, _only(greedy(x), x), warm)


def sample(
    logits: jax.Array,
    controls: Controls,
    keys: jax.Array,
    *,
    context: Context | None = None,
    processors: Sequence[Processor] = (),
) -> jax.Array:
    """Tokens int32 `[B]` drawn from `softmax(process(...))`, row b with `keys[b]`: what
    `jax.random.categorical(keys[b], process(...)[b])` returns."""
    if controls.temperature is None:
        return greedy(adjust(logits, controls, context, processors))
    x = process(logits, controls, context=context, processors=processors)
    # An entry's noise depends on the key and its place alone, so each chip of a mesh has its part of one array.
    entries = x.shape[1] * size(split_axis.AXIS)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (entries,), jnp.float32))(keys)
    noise = part(noise, split_axis.AXIS, 1)
    # Without the barrier the noise is drawn once for the maximum and once more for its place.
    return greedy(jax.lax.optimization_barrier(x + noise))


def adjust(
    logits: jax.Array, controls: Controls, context: Context | None, processors: Sequence[Processor]
) -> jax.Array:
    """The part of `process` that acts at temperature 0 too."""
    x = logits.astype(jnp.float32)
    if controls.penalty is not None:
        if context is None or context.seen is None:
            raise InputError("repetition_penalty needs context.seen: the tokens of the prompt and the output")
        penalty = controls.penalty[:, None]
        x = jnp.where(context.seen, jnp.where(x < 0, x * penalty, x / penalty), x)
    if controls.bias is not None and controls.bias_ids is not None:
        rows = jnp.arange(x.shape[0])[:, None]
        x = x.at[rows, split_axis.own_entries(controls.bias_ids, x.shape[1])].add(controls.bias, mode="drop")
    if processors:
        if context is None:
            raise InputError("processors need a context")
        here = x.shape[1]
        x = split_axis.whole(x, context.vocab)
        if context.seen is not None:
            context = replace(context, seen=split_axis.whole(context.seen, context.vocab))
        for processor in processors:
            x = processor(x, context)
        x = split_axis.own(x, here, fill=-jnp.inf)
    return x


def greedy(x: jax.Array) -> jax.Array:
    """The first index of each row's maximum, int32 `[B]`."""
    return split_axis.argmax(x)


def row_keys(seeds: jax.Array, emitted: jax.Array) -> jax.Array:
    """Keys `[B]` for each row's token number `emitted[b]`: `fold_in(key(seeds[b]), emitted[b])`."""
    return jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.key(seed), t))(seeds, emitted)


def _only(token: jax.Array, x: jax.Array) -> jax.Array:
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + split_axis.first_entry(x)
    return jnp.where(place == token[:, None], 0.0, -jnp.inf)


def _warp(x: jax.Array, controls: Controls, temperature: jax.Array) -> jax.Array:
    x = x / jnp.maximum(temperature, _COLDEST)
    if controls.top_k is not None:
        bits = _ordered(x)
        k = controls.top_k
        low, high = jnp.full_like(k, -(2**31)), jnp.full_like(k, 2**31 - 1)
        least = _largest(lambda t: split_axis.total(bits >= t[:, None]) >= k, low, high)
        x = jnp.where(bits >= least[:, None], x, -jnp.inf)
    if controls.top_p is not None:
        p = split_axis.softmax(x)
        bits = jax.lax.bitcast_convert_type(p, jnp.int32)
        goal = controls.top_p
        zero = jnp.zeros(goal.shape, jnp.int32)
        least = _largest(
            lambda t: split_axis.total(jnp.where(bits >= t[:, None], p, 0.0)) >= goal,
            zero,
            jnp.full_like(zero, 0x3F800001),  # one past the bits of 1.0
        )
        x = jnp.where(bits >= least[:, None], x, -jnp.inf)
    if controls.min_p is not None:
        floor = split_axis.maximum(x) + jnp.log(controls.min_p)
        x = jnp.where(x >= floor[:, None], x, -jnp.inf)
    return x


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest int32 in `[low, high)` for which the falling predicate `holds`; `low` is taken to hold.

    A search over the bits of a threshold is exact and takes 32 passes over the row; sorting 150 k entries
    costs forty times that on a CPU.
    """

    def halve(_, ends):
        low, high = ends
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        yes = holds(middle)
        return jnp.where(yes, middle, low), jnp.where(yes, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return low
