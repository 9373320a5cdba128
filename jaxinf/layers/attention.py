"""Multi-head, grouped-query and multi-query attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import AttentionRule, LayerCache, Step
from jaxinf.cache.base import DECODE_TOKENS, attend_alone
from jaxinf.layers.ahead import together
from jaxinf.layers.linear import Linear
from jaxinf.layers.norm import NormSpec, RMSNormSpec
from jaxinf.layers.parameters import constant
from jaxinf.layers.rope import RopeSpec, alibi_slopes
from pallas_kernels import flash_attention
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.streamed_matmul import Fetched
from sharding.collectives import part


@dataclass(frozen=True)
class QKNormSpec:
    """Normalises queries and keys before rope.

    over: "head": each head by itself, one scale for all (Qwen3, Gemma 3); "heads": each head by itself, a
      scale for each (Cohere, StableLM); "width": all heads together (OLMo 2).
    """

    norm: NormSpec = RMSNormSpec()
    over: Literal["head", "heads", "width"] = "head"


@dataclass(frozen=True)
class AlibiSpec:
    """Linear biases by distance (Press et al. 2022). `scale` multiplies the slopes."""

    bias_max: float = 8.0
    scale: float = 1.0


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer (Vaswani et al. 2017; grouped queries: Ainslie et al. 2023).

    heads, kv_heads: query heads and key/value heads; heads % kv_heads == 0.
    window: a query sees this many latest tokens, itself included; None: all.
    scale: multiplies scores; None: head_dim^-0.5.
    softcap: scores become c * tanh(scores / c).
    sinks: a learned logit a head joins the softmax (GPT-OSS).
    clip: queries, keys and values are clipped to [-clip, clip], after a norm over the width and before one a head
      (OLMoE, MPT).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None = None
    window: int | None = None
    qk_norm: QKNormSpec | None = None
    alibi: AlibiSpec | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    clip: float | None = None


class Attention(nnx.Module):
    """Projects, normalises, lets the cache attend, projects back."""

    def __init__(self, spec: AttentionSpec, d_model: int, *, rngs: nnx.Rngs, dtype):
        self.spec = spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        make: dict[str, Any] = dict(rngs=rngs, dtype=dtype, quantizable=True)
        self.query = Linear(d_model, q, axes=("embed", "heads"), bias=spec.qkv_bias, **make)
        self.key = Linear(d_model, kv, axes=("embed", "kv_heads"), bias=spec.qkv_bias, **make)
        self.value = Linear(d_model, kv, axes=("embed", "kv_heads"), bias=spec.qkv_bias, **make)
        self.out = Linear(q, d_model, axes=("heads", "embed"), bias=spec.out_bias, **make)
        self.query_norm = self._norm(spec.heads, "heads", dtype)
        self.key_norm = self._norm(spec.kv_heads, "kv_heads", dtype)
        self.sinks = constant(0.0, (spec.heads,), ("heads",), dtype) if spec.sinks else None

    def _norm(self, heads: int, axis: str, dtype) -> nnx.Module | None:
        qk, dim = self.spec.qk_norm, self.spec.head_dim
        if qk is None:
            return None
        shape, axes = {
            "head": ((dim,), (None,)),
            "heads": ((heads, dim), (axis, None)),
            "width": ((heads * dim,), (axis,)),
        }[qk.over]
        return qk.norm.build(shape, dtype=dtype, axes=axes)

    def __call__(
        self,
        x: jax.Array,
        step: Step,
        cache: LayerCache | None,
        *,
        layer=None,
        segment_ids: jax.Array | None = None,
        fetched: Sequence[Fetched | None] = (None, None),
        whole: bool = True,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [B, T, d]` -> `([B, T, d], the cache after)`.

        Without a cache the T tokens see each other alone, within equal `segment_ids` int32 `[B, T]`.

        fetched: of the weights of `first` and of `out`, what is on its way. whole: the result is summed over
        chips; else it is this chip's summand.
        """
        spec = self.spec
        q, k, v = together(x, self.first, fetched[0])
        q, k, v = self._heads(q, self.query_norm), self._heads(k, self.key_norm), self._heads(v, None)
        rope = spec.rope
        rule = AttentionRule(
            rotate=None if rope is None else lambda x, at: rope.rotate(x, at, step.totals),
            window=spec.window,
            scale=spec.scale,
            softcap=spec.softcap,
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            alibi_slopes=None
            if spec.alibi is None
            else part(
                jnp.asarray(alibi_slopes(spec.heads, bias_max=spec.alibi.bias_max) * spec.alibi.scale), "tensor", 0
            ),
        )
        if cache is None and step.zigzag:
            if segment_ids is not None:
                raise UnsupportedError(
                    "segment_ids are for passes that are not split over `sequence`: use sequence=1."
                )
            out = attend_alone(rule.turn(q, step.positions), rule.turn(k, step.positions), v, step, rule)
        elif cache is None:
            out = flash_attention(
                rule.turn(q, step.positions),
                rule.turn(k, step.positions),
                v,
                lengths=step.counts,
                q_segment_ids=segment_ids,
                kv_segment_ids=segment_ids,
                **rule.mask,
            )
        else:
            out, cache = cache.step(q, k, v, step, rule, layer=layer)
        b, n, t, d = out.shape
        out = out.swapaxes(1, 2).reshape(b, t, n * d)
        return together(out, (self.out,), fetched[1], whole=whole)[0], cache

    @property
    def first(self) -> tuple[Linear, ...]:
        """The products that meet x."""
        return self.query, self.key, self.value

    def _heads(self, x: jax.Array, norm: nnx.Module | None) -> jax.Array:
        """`[B, T, heads * D]` -> `[B, heads, T, D]`, clipped and normalised; of this chip's heads."""
        spec = self.spec
        over = spec.qk_norm.over if spec.qk_norm is not None else None
        if norm is not None and over == "width":
            x = norm(x)
        if spec.clip is not None:
            x = jnp.clip(x, -spec.clip, spec.clip)
        if x.shape[1] <= DECODE_TOKENS:
            # Or a TPU's layout of heads reaches back to the weights, and a decode loop begins by copying them.
            x = jax.lax.optimization_barrier(x)
        x = x.reshape(*x.shape[:2], -1, spec.head_dim)
        if norm is not None and over != "width":
            x = norm(x)
        return x.swapaxes(1, 2)
