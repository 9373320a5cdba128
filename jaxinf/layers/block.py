"""One transformer layer: attention and a feed-forward part around the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from jaxinf.cache import LayerCache, Step
from jaxinf.layers import ahead
from jaxinf.layers.ahead import Unsummed
from jaxinf.layers.attention import Attention, AttentionSpec
from jaxinf.layers.blockwise import block_tokens, by_blocks
from jaxinf.layers.ffn import FFN, FFNSpec
from jaxinf.layers.moe import MoESpec
from jaxinf.layers.norm import NormSpec, RMSNormSpec

Placement = Literal["pre", "renormed", "post", "sandwich", "parallel", "parallel_two_norms"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer. With A attention, F feed-forward and n norms of their own, `placement` is

      pre:      x += A(n(x)); x += F(n(x))                    Llama
      renormed: h = n(x); x = h + A(h); h = n(x); x = h + F(h)  (an option of BLOOM)
      post:     x += n(A(x)); x += n(F(x))                    OLMo 2
      sandwich: x += n(A(n(x))); x += n(F(n(x)))              Gemma 2
      parallel: h = n(x); x += A(h) + F(h)                    Cohere
      parallel_two_norms: x += A(n(x)) + F(n(x))              GPT-NeoX

    residual_scale: multiplies what is added to the residual stream (Granite).
    """

    attention: AttentionSpec
    ffn: FFNSpec | MoESpec
    norm: NormSpec = RMSNormSpec()
    placement: Placement = "pre"
    residual_scale: float = 1.0


class Block(nnx.Module):
    def __init__(self, spec: LayerSpec, d_model: int, *, rngs: nnx.Rngs, dtype):
        self.spec = spec
        self.attention = Attention(spec.attention, d_model, rngs=rngs, dtype=dtype)
        self.ffn = spec.ffn.build(d_model, rngs=rngs, dtype=dtype)

        def norm(*placements: str) -> nnx.Module | None:
            if spec.placement not in placements:
                return None
            return spec.norm.build(d_model, dtype=dtype, axes=("embed",))

        self.attention_norm = norm("pre", "renormed", "sandwich", "parallel", "parallel_two_norms")
        self.ffn_norm = norm("pre", "renormed", "sandwich", "parallel_two_norms")
        self.attention_post_norm = norm("post", "sandwich")
        self.ffn_post_norm = norm("post", "sandwich")

    def __call__(
        self, x: jax.Array, step: Step, cache: LayerCache | None, *, layer=None, segment_ids=None
    ) -> tuple[jax.Array, LayerCache | None, jax.Array]:
        """`x [B, T, d]` -> `([B, T, d], the cache after, balancing loss)`."""
        scale, cached, parallel = self.spec.residual_scale, cache is not None, self._parallel

        def add(x, y):
            return x + (y if scale == 1.0 else y * scale)

        def feed(x, h, attended):
            """The layer's result. h: what feeds it, if it has no norm of its own; attended: only in parallel."""
            if not parallel:
                h = x if self.ffn_norm is None else self.ffn_norm(x)
            elif h is None:
                assert self.ffn_norm is not None
                h = self.ffn_norm(x)
            fed, loss = self.ffn(h, cached=cached)
            if parallel:
                return add(x, attended + fed), loss
            fed = fed if self.ffn_post_norm is None else self.ffn_post_norm(fed)
            return add(h if self.spec.placement == "renormed" else x, fed), loss

        h = x if self.attention_norm is None else self.attention_norm(x)
        attended, cache = self.attention(h, step, cache, layer=layer, segment_ids=segment_ids)
        if parallel:
            x, loss = self._by_blocks(feed, cached, x, None if self.ffn_norm is not None else h, attended)
            return x, cache, loss
        x = add(
            h if self.spec.placement == "renormed" else x,
            attended if self.attention_post_norm is None else self.attention_post_norm(attended),
        )
        x, loss = self._by_blocks(feed, cached, x, None, None)
        return x, cache, loss

    def leaves_sums(self, rows: int) -> bool:
        """Whether `settling` pays, in a pass of so many rows of activations over a cache."""
        a, f = self.attention, self.ffn
        if self.spec.placement != "pre" or self.spec.residual_scale != 1.0 or not isinstance(f, FFN):
            return False
        if a.out.bias is not None or f.down.bias is not None:
            return False
        return ahead.pays((*a.first, a.out, *f.first, f.down), rows)

    def settling(
        self, stream: Unsummed, step: Step, cache: LayerCache | None, *, layer=None
    ) -> tuple[Unsummed, LayerCache | None, jax.Array]:
        """The same, of a stream whose last sum over chips is still to be taken; the layer's own is left as well."""
        assert self.attention_norm is not None
        assert self.ffn_norm is not None
        assert isinstance(self.ffn, FFN)
        attention, ffn = self.attention, self.ffn
        # Rope, the cache and what queries send are short: they leave HBM time for more than what attention needs.
        # Of the last weight more than half, so that products with it last as long as the rest is on its way.
        x, first, (out, down) = stream.settle(attention.first, ((attention.out, 1.0), (ffn.down, 0.6)))
        h = self.attention_norm(x)
        attended, cache = attention(h, step, cache, layer=layer, fetched=(first, out), whole=False)
        x, first, _ = Unsummed(x, attended).settle(ffn.first)
        fed, loss = ffn(self.ffn_norm(x), fetched=(first, down), whole=False)
        return Unsummed(x, fed), cache, loss

    @property
    def _parallel(self) -> bool:
        return self.spec.placement.startswith("parallel")

    def _by_blocks(self, feed, cached: bool, *arrays) -> tuple[jax.Array, jax.Array]:
        # A mixture's balancing loss is of all tokens together; where it is not wanted, blocks do.
        if not cached and isinstance(self.spec.ffn, MoESpec):
            return feed(*arrays)
        return by_blocks(feed, block_tokens(self.spec.ffn.token_bytes(arrays[0].shape[-1])), *arrays)
