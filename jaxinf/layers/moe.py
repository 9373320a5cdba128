"""Mixture-of-experts feed-forward layers (Shazeer et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.layers.ffn import FFN, ActivationSpec, FFNSpec, Gated
from jaxinf.layers.linear import Linear
from jaxinf.layers.parameters import constant, normal
from jaxinf.layers.routing import by_pairs, by_rows, in_windows
from jaxinf.quant import grouped
from pallas_kernels.errors import UnsupportedError
from sharding import collectives, zigzag
from sharding.collectives import all_gather, all_to_all, reduce_scatter
from sharding.experts import spread


@dataclass(frozen=True)
class RouterSpec:
    """Which experts serve which token. Scores are float32."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False

    def scores(self, logits: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits, axis=-1) if self.score == "softmax" else jax.nn.sigmoid(logits)


@dataclass(frozen=True)
class TokenChoice(RouterSpec):
    """Each token goes to its `top_k` experts of highest score.

    normalise: weights of the chosen experts are divided by their sum.
    selection_bias: a learned bias joins the scores for choosing alone, not for weighing (DeepSeek-V3).
    scale: multiplies the weights.
    bias: the router's logits have a bias.
    """

    top_k: int = 2
    normalise: bool = True
    selection_bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class ExpertChoice(RouterSpec):
    """Each expert takes the tokens that score it highest (Zhou et al. 2022): a token may get none or many.

    capacity_factor: experts a token gets on average.
    among: "batch": all tokens of the pass, so that a token's output depends on later ones: no cached
      generation; "step": the rows' tokens at the same column, so that it depends on other rows alone.
    """

    capacity_factor: float = 2.0
    among: Literal["batch", "step"] = "batch"


@dataclass(frozen=True)
class MoESpec:
    """`experts` feed-forward layers of `width` hidden channels behind a router.

    shared: a dense layer that serves every token, added; `shared_gate` weighs it by a learned sigmoid.
    """

    experts: int
    width: int
    router: RouterSpec = TokenChoice()
    activation: ActivationSpec = Gated()
    bias: bool = False
    shared: FFNSpec | None = None
    shared_gate: bool = False

    def token_bytes(self, d_model: int) -> int:
        """About what a token takes on each chip: as in `FFNSpec`, for each expert that serves it."""
        router = self.router
        served = math.ceil(router.capacity_factor) if isinstance(router, ExpertChoice) else 1
        served = router.top_k if isinstance(router, TokenChoice) else served
        rest = 0 if self.shared is None else self.shared.token_bytes(d_model)
        return served * FFNSpec(self.width).token_bytes(d_model) + rest

    def build(self, d_model: int, *, rngs: nnx.Rngs, dtype) -> MoE:
        return MoE(self, d_model, rngs=rngs, dtype=dtype)


class Experts(nnx.Module):
    """Stacked weights `[E, in, out]`, in a sharded program this chip's; rows arrive sorted by expert."""

    def __init__(self, spec: MoESpec, d: int, *, rngs: nnx.Rngs, dtype):
        e, w = spec.experts, spec.width
        wide, back = ("expert", "embed", "expert_ffn"), ("expert", "expert_ffn", "embed")
        self.activation = spec.activation
        make = partial(normal, rngs, dtype=dtype, in_place=True, quantizable=True)
        self.up = make((e, d, w), wide, std=d**-0.5)
        self.gate = make((e, d, w), wide, std=d**-0.5) if spec.activation.gated else None
        self.down = make((e, w, d), back, std=w**-0.5)
        bias = spec.bias
        self.up_bias = constant(0.0, (e, w), ("expert", "expert_ffn"), dtype) if bias else None
        gated = bias and spec.activation.gated
        self.gate_bias = constant(0.0, (e, w), ("expert", "expert_ffn"), dtype) if gated else None
        self.down_bias = constant(0.0, (e, d), ("expert", "embed"), dtype) if bias else None

    def __call__(self, rows: jax.Array, sizes: jax.Array, owner: jax.Array) -> jax.Array:
        """`rows [M, d]` sorted by expert, `sizes` int32 `[E]`, `owner` int32 `[M]` -> `[M, d]` in the rows' dtype,
        without the last bias (`added`); partial sums where the width is split over `tensor`."""
        return grouped(self.hidden(rows, sizes, owner), self.down.get_value(), sizes)

    def hidden(self, rows: jax.Array, sizes: jax.Array, owner: jax.Array) -> jax.Array:
        """What the last projection gets: `[M, width]` in the rows' dtype."""

        def project(weight, bias):
            y = grouped(rows, weight.get_value(), sizes).astype(jnp.float32)
            return y if bias is None else y + jnp.take(bias[...], owner, axis=0).astype(jnp.float32)

        up = project(self.up, self.up_bias)
        gate = None if self.gate is None else project(self.gate, self.gate_bias)
        return self.activation(up, gate).astype(rows.dtype)

    @property
    def added(self) -> jax.Array | None:
        """`[E, d]`, what is to be added to each expert's output; not zero on one chip of `tensor` alone."""
        if self.down_bias is None:
            return None
        bias = self.down_bias[...]
        return bias if collectives.size("tensor") == 1 else jnp.where(collectives.index("tensor") == 0, bias, 0)


class MoE(nnx.Module):
    def __init__(self, spec: MoESpec, d_model: int, *, rngs: nnx.Rngs, dtype):
        self.spec = spec
        router = spec.router
        self.router = Linear(d_model, spec.experts, axes=("embed", None), bias=router.bias, rngs=rngs, dtype=dtype)
        selects = isinstance(router, TokenChoice) and router.selection_bias
        self.selection_bias = constant(0.0, (spec.experts,), (None,), jnp.float32) if selects else None
        self.experts = Experts(spec, d_model, rngs=rngs, dtype=dtype)
        self.shared = None if spec.shared is None else FFN(spec.shared, d_model, rngs=rngs, dtype=dtype)
        gate = spec.shared is not None and spec.shared_gate
        self.shared_gate = Linear(d_model, 1, axes=("embed", None), rngs=rngs, dtype=dtype) if gate else None

    def __call__(self, x: jax.Array, *, cached: bool = False) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, d]` -> `([B, T, d], balancing loss)`.

        The loss is E * sum_e f_e p_e, with f_e the fraction of choices that fell on expert e and p_e its mean
        probability (Fedus et al. 2022, eq. 4): 1 when balanced. With `cached` it is 0: nobody trains.

        In a sharded program x are this chip's tokens: the same along `tensor`, others along `data` and `expert`,
        and along `sequence` unless `cached`. The loss is that of all of them.

        Raises:
          UnsupportedError: expert choice among the whole batch, in cached generation.
        """
        logits = self.router(x.astype(jnp.float32))
        scores = self.spec.router.scores(logits)
        if isinstance(self.spec.router, ExpertChoice):
            if cached and self.spec.router.among == "batch":
                raise UnsupportedError(
                    "expert-choice routing among the batch sees later tokens, so it cannot generate with a cache; "
                    'use ExpertChoice(among="step") or token-choice routing'
                )
            out, loss = self._expert_choice(x, scores, self.spec.router), jnp.zeros((), jnp.float32)
        else:
            out, loss = self._token_choice(x, scores, None if cached else logits, self.spec.router)
        out = collectives.psum(out.astype(x.dtype), "tensor")
        if self.shared is not None:
            shared, _ = self.shared(x)
            if self.shared_gate is not None:
                shared = (shared * jax.nn.sigmoid(self.shared_gate(x.astype(jnp.float32)))).astype(x.dtype)
            out = out + shared
        return out, loss

    def _token_choice(self, x, scores, logits, router) -> tuple[jax.Array, jax.Array]:
        b, t, d = x.shape
        k, experts = router.top_k, self.spec.experts
        if self.selection_bias is None:
            weights, chosen = jax.lax.top_k(scores, k)
        else:
            _, chosen = jax.lax.top_k(scores + self.selection_bias[...], k)
            weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if router.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights * router.scale

        rows, chosen = x.reshape(b * t, d), chosen.reshape(b * t, k)
        out = spread(rows, chosen, weights.reshape(b * t, k), experts, self._served)
        if logits is None:
            return out.reshape(b, t, d), jnp.zeros((), jnp.float32)
        own = collectives.size("expert", "data", "sequence")
        share = jnp.mean(chosen.reshape(-1)[:, None] == jnp.arange(experts), axis=0, dtype=jnp.float32)
        mean = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(0, 1))
        share, mean = collectives.psum((share / own, mean / own), "data", "sequence", "expert")
        return out.reshape(b, t, d), experts * jnp.sum(share * mean)

    def _served(self, rows, local, weights, **window) -> jax.Array:
        serve = in_windows if window else by_rows
        held = self.spec.experts // collectives.size("expert")
        return serve(rows, local, weights, self.experts, experts=held, bias=self.experts.added, **window)

    def _expert_choice(self, x, scores, router) -> jax.Array:
        """A chip's experts choose among the tokens of all chips, and serve those of its own `expert` group."""
        b, t, d = x.shape
        held = self.spec.experts // collectives.size("expert")
        whole = router.among == "batch"
        scores = all_gather(all_to_all(scores, "expert", split=2, concat=0), "data", 0)
        if whole and t > 1:
            scores = zigzag.whole(scores)
        rows, columns, _ = scores.shape
        groups = scores.reshape(1, rows * columns, held) if whole else scores.swapaxes(0, 1)
        n = groups.shape[1]
        capacity = max(1, min(n, math.ceil(n * router.capacity_factor / self.spec.experts)))
        weights, taken = jax.lax.top_k(groups.swapaxes(1, 2), capacity)  # [groups, held, capacity]
        row, column = (taken // columns, taken % columns) if whole else (taken, jnp.arange(columns)[:, None, None])
        chip = collectives.index("sequence")
        if columns > t:
            chip, column = zigzag.place(column, t, columns // t)
        near = b * collectives.size("expert")
        row = row - collectives.index("data") * near
        mine = (row >= 0) & (row < near) & (chip == collectives.index("sequence"))
        owner = jnp.where(mine, jnp.arange(held, dtype=jnp.int32)[:, None], held)
        everyone = all_gather(x.reshape(b * t, d), "expert", 0)
        flat = ((row * t + column).reshape(-1), owner.reshape(-1), weights.reshape(-1))
        out = by_pairs(everyone, *flat, self.experts, experts=held, bias=self.experts.added)
        return reduce_scatter(out, "expert", 0).reshape(b, t, d)
