"""Rotary position embeddings (Su et al. 2021), each scaling a type of its own.

A rope turns positions into angles `positions * inv_freq` and rotates pairs of channels by them, in
float32. `interleaved` pairs channel 2i with 2i+1 (GPT-J, Cohere), else i with i + dim/2 (GPT-NeoX, Llama).
Only the first `dim` channels of a head rotate (partial rope); the others pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RopeSpec:
    """The plain rope: inv_freq_i = theta^(-2i / dim).

    dim: channels that rotate, even.
    """

    dim: int
    theta: float = 10_000.0
    interleaved: bool = False

    def frequencies(self, totals: jax.Array) -> jax.Array:
        """Angular frequencies, float32 `[dim / 2]`, or `[B, dim / 2]` where they depend on the length.

        totals: int32 `[B]`, tokens in each row once this pass is done.
        """
        return jnp.asarray(self._base(), jnp.float32)

    @property
    def settled(self) -> int | None:
        """Tokens up to which angles do not depend on how long a row is; None: they never do.

        A prompt that may be longer must be read in one pass.
        """
        return None

    @property
    def attention_factor(self) -> float:
        """cos and sin are multiplied by this (so scores by its square)."""
        return 1.0

    def rotate(self, x: jax.Array, positions: jax.Array, totals: jax.Array) -> jax.Array:
        """`x [B, N, T, D]` rotated to `positions` int32 `[B, T]`; `totals` int32 `[B]`."""
        freq = self.frequencies(totals)
        freq = freq[:, None, None, :] if freq.ndim == 2 else freq
        angle = positions.astype(jnp.float32)[:, None, :, None] * freq
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        turn, keep = x[..., : self.dim].astype(jnp.float32), x[..., self.dim :]
        if self.interleaved:
            a, b = turn[..., 0::2], turn[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turn.shape)
        else:
            a, b = jnp.split(turn, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = turned.astype(x.dtype)
        return jnp.concatenate([turned, keep], axis=-1) if keep.shape[-1] else turned

    def _base(self, theta: float | None = None) -> np.ndarray:
        return (theta or self.theta) ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)


@dataclass(frozen=True)
class LinearRopeSpec(RopeSpec):
    """Position interpolation (Chen et al. 2023): positions divided by `factor`."""

    factor: float = 1.0

    def frequencies(self, totals):
        return jnp.asarray(self._base() / self.factor, jnp.float32)


@dataclass(frozen=True)
class DynamicNTKRopeSpec(RopeSpec):
    """Dynamic NTK-aware scaling: past the trained length L, theta grows with the row's length s,
    theta' = theta * (factor * s / L - (factor - 1))^(dim / (dim - 2)).

    Keys already in a cache keep the angles of the pass that wrote them, as in Hugging Face.
    """

    factor: float = 1.0
    original_max: int = 2048

    @property
    def settled(self) -> int | None:
        return self.original_max

    def frequencies(self, totals):
        s = jnp.maximum(totals, self.original_max).astype(jnp.float32)
        grow = (self.factor * s / self.original_max - (self.factor - 1.0)) ** (self.dim / (self.dim - 2))
        exponent = jnp.asarray(np.arange(0, self.dim, 2) / self.dim, jnp.float32)
        return (self.theta * grow)[:, None] ** -exponent


@dataclass(frozen=True)
class Llama3RopeSpec(RopeSpec):
    """Llama 3.1 scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max: int = 8192

    def frequencies(self, totals):
        base = self._base()
        turns = self.original_max * base / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ramp = np.clip(ramp, 0.0, 1.0)
        return jnp.asarray((1 - ramp) * base / self.factor + ramp * base, jnp.float32)


@dataclass(frozen=True)
class YarnRopeSpec(RopeSpec):
    """YaRN (Peng et al. 2023, sections 3.2-3.4): interpolate channels that turn less than `beta_slow`
    times over the trained length, keep those that turn more than `beta_fast` times, ramp between.

    factor_on_scores: what cos and sin are multiplied by; None: 0.1 ln(factor) + 1.
    truncate: round the ends of the ramp to whole channels.
    """

    factor: float = 1.0
    original_max: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factor_on_scores: float | None = None
    truncate: bool = True

    def frequencies(self, totals):
        def channel(turns: float) -> float:
            return self.dim * math.log(self.original_max / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        span = high - low if high != low else 0.001
        ramp = np.clip((np.arange(self.dim // 2) - low) / span, 0.0, 1.0)
        base = self._base()
        return jnp.asarray(base / self.factor * ramp + base * (1 - ramp), jnp.float32)

    @property
    def attention_factor(self) -> float:
        if self.factor_on_scores is not None:
            return self.factor_on_scores
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class LongRopeSpec(RopeSpec):
    """LongRoPE (Ding et al. 2024): each channel's frequency divided by its own factor; `long` once a row
    is longer than `original_max`, `short` before.

    factor_on_scores: what cos and sin are multiplied by.
    Keys already in a cache keep the angles of the pass that wrote them, as in Hugging Face.
    """

    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    original_max: int = 4096
    factor_on_scores: float = 1.0

    @property
    def settled(self) -> int | None:
        return self.original_max

    def frequencies(self, totals):
        base = self._base()
        short, long = base / np.asarray(self.short), base / np.asarray(self.long)
        past = (totals > self.original_max)[:, None]
        return jnp.where(past, jnp.asarray(long, jnp.float32), jnp.asarray(short, jnp.float32))

    @property
    def attention_factor(self) -> float:
        return self.factor_on_scores


def alibi_slopes(heads: int, *, bias_max: float = 8.0) -> np.ndarray:
    """Slopes of ALiBi (Press et al. 2022, section 3), float32 `[heads]`, negative distances times these.

    For a number of heads that is no power of two, every second slope of the next power fills up.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-bias_max * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-bias_max * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return np.asarray(slopes, np.float32)
