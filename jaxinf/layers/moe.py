"""Mixture-of-experts feed-forward layers (Shazeer et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.core.stacked import unstack
from jaxinf.layers.ffn import FFN, ActivationSpec, FFNSpec, Gated
from jaxinf.layers.linear import Linear
from jaxinf.layers.parameters import constant, normal
from pallas_kernels import grouped_matmul
from pallas_kernels.errors import UnsupportedError


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

    def build(self, d_model: int, *, rngs: nnx.Rngs, dtype) -> MoE:
        return MoE(self, d_model, rngs=rngs, dtype=dtype)


class Experts(nnx.Module):
    """Stacked weights `[E, in, out]`; rows arrive sorted by expert."""

    def __init__(self, spec: MoESpec, d: int, *, rngs: nnx.Rngs, dtype):
        e, w = spec.experts, spec.width
        wide, back = ("expert", "embed", "expert_ffn"), ("expert", "expert_ffn", "embed")
        self.activation = spec.activation
        make = partial(normal, rngs, dtype=dtype, in_place=True)
        self.up = make((e, d, w), wide, std=d**-0.5)
        self.gate = make((e, d, w), wide, std=d**-0.5) if spec.activation.gated else None
        self.down = make((e, w, d), back, std=w**-0.5)
        bias = spec.bias
        self.up_bias = constant(0.0, (e, w), ("expert", "expert_ffn"), dtype) if bias else None
        gated = bias and spec.activation.gated
        self.gate_bias = constant(0.0, (e, w), ("expert", "expert_ffn"), dtype) if gated else None
        self.down_bias = constant(0.0, (e, d), ("expert", "embed"), dtype) if bias else None

    def __call__(self, rows: jax.Array, sizes: jax.Array, owner: jax.Array) -> jax.Array:
        """`rows [M, d]` sorted by expert, `sizes` int32 `[E]`, `owner` int32 `[M]` -> `[M, d]`."""

        def project(x, weight, bias):
            matrices, layer = unstack(weight.get_value())
            y = grouped_matmul(x, matrices, sizes, layer=layer).astype(jnp.float32)
            return y if bias is None else y + jnp.take(bias[...], owner, axis=0).astype(jnp.float32)

        up = project(rows, self.up, self.up_bias)
        gate = None if self.gate is None else project(rows, self.gate, self.gate_bias)
        return project(self.activation(up, gate).astype(rows.dtype), self.down, self.down_bias)


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
        probability (Fedus et al. 2022, eq. 4): 1 when balanced.

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
            out, loss = self._expert_choice(x, scores, self.spec.router)
        else:
            out, loss = self._token_choice(x, scores, logits, self.spec.router)
        out = out.astype(x.dtype)
        if self.shared is not None:
            shared, _ = self.shared(x)
            if self.shared_gate is not None:
                shared = (shared * jax.nn.sigmoid(self.shared_gate(x.astype(jnp.float32)))).astype(x.dtype)
            out = out + shared
        return out, loss

    def _token_choice(self, x, scores, logits, router) -> tuple[jax.Array, jax.Array]:
        b, t, d = x.shape
        k, experts = router.top_k, self.spec.experts
        ranked = scores if self.selection_bias is None else scores + self.selection_bias[...]
        _, chosen = jax.lax.top_k(ranked, k)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if router.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights * router.scale

        # Sort the (token, choice) pairs by expert, multiply group by group, add back.
        owner = chosen.reshape(-1)
        order = jnp.argsort(owner, stable=True)
        sizes = jnp.bincount(owner, length=experts).astype(jnp.int32)
        rows = jnp.take(x.reshape(b * t, d), order // k, axis=0)
        y = self.experts(rows, sizes, jnp.take(owner, order))
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(b, t, k, d)
        out = jnp.einsum("btkd,btk->btd", y, weights.astype(y.dtype), precision="highest")

        share = sizes.astype(jnp.float32) / (b * t * k)
        mean = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(0, 1))
        return out, experts * jnp.sum(share * mean)

    def _expert_choice(self, x, scores, router) -> tuple[jax.Array, jax.Array]:
        b, t, d = x.shape
        experts = self.spec.experts
        groups = x.reshape(1, b * t, d) if router.among == "batch" else x.swapaxes(0, 1)
        by_group = scores.reshape(1, b * t, -1) if router.among == "batch" else scores.swapaxes(0, 1)
        g, n, _ = groups.shape
        capacity = max(1, min(n, math.ceil(n * router.capacity_factor / experts)))
        weights, taken = jax.lax.top_k(by_group.swapaxes(1, 2), capacity)  # [g, E, capacity]
        token = (taken + jnp.arange(g)[:, None, None] * n).swapaxes(0, 1).reshape(-1)
        sizes = jnp.full((experts,), g * capacity, jnp.int32)
        owner = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), g * capacity)
        y = self.experts(jnp.take(groups.reshape(g * n, d), token, axis=0), sizes, owner)
        y = y * weights.swapaxes(0, 1).reshape(-1, 1)
        out = jnp.zeros((g * n, d), jnp.float32).at[token].add(y)
        out = out.reshape(b, t, d) if router.among == "batch" else out.reshape(t, b, d).swapaxes(0, 1)
        return out, jnp.zeros((), jnp.float32)
