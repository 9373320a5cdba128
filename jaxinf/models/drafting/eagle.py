"""Eagle: autoregression on the target's features, and its form with a module a step.

EAGLE (Li et al. 2024, arXiv:2401.15077) feeds its one module with its own features; multi-token prediction
(DeepSeek-V3, arXiv:2412.19437, section 2.2) has a module for each step, each with its own attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache, Kind, Step
from jaxinf.layers import Block, LayerSpec, Linear, NormSpec, RMSNormSpec
from jaxinf.models.causal_lm import CausalLM, init_cache
from jaxinf.models.spec import ModelSpec, Segment
from pallas_kernels.errors import InputError
from sharding.collectives import alone


@dataclass(frozen=True)
class EagleSpec:
    """d_model: of the target's features.

    layer: a block, which may be narrower or wider than the target's. blocks: of each module.
    modules: step i of a draft uses module min(i, modules - 1); 1: EAGLE.
    norm: of both inputs and of the result.
    """

    d_model: int
    layer: LayerSpec
    blocks: int = 1
    modules: int = 1
    norm: NormSpec = RMSNormSpec()

    def __post_init__(self):
        for name in ("d_model", "blocks", "modules"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        self.stacks()  # checks the layer

    def stacks(self) -> ModelSpec:
        """The blocks as the layers of a model, a segment a module: for what is made by layers."""
        return ModelSpec(1, self.d_model, (Segment((self.layer,), self.blocks),) * self.modules, 1)


class Module(nnx.Module):
    """`norm(blocks(W [norm(feature); norm(embedding)]))`."""

    def __init__(self, spec: EagleSpec, *, rngs: nnx.Rngs, dtype):
        d = spec.d_model
        self.feature_norm, self.token_norm, self.norm = (
            spec.norm.build(d, dtype=dtype, axes=("embed",)) for _ in range(3)
        )
        self.fuse = Linear(2 * d, d, axes=(None, "embed"), rngs=rngs, dtype=dtype, quantizable=True)
        self.blocks = nnx.List([Block(spec.layer, d, rngs=rngs, dtype=dtype) for _ in range(spec.blocks)])

    def __call__(self, features: jax.Array, embedded: jax.Array, step: Step, caches):
        """`[B, T, d]` twice, and a cache a block or None -> `([B, T, d], the caches after)`."""
        x = self.fuse(jnp.concatenate([self.feature_norm(features), self.token_norm(embedded)], axis=-1))
        after = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache, _ = block(x, step, cache)
            after.append(cache)
        return self.norm(x), tuple(after)


class EagleHead(nnx.Module):
    """Of the feature at t and the token at t + 1 it makes the feature at t + 1, whose logits, by the target's own
    head, predict token t + 2. On a mesh every chip has it whole, for its own rows."""

    def __init__(self, spec: EagleSpec, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.spec = spec
        self.modules = nnx.List([Module(spec, rngs=rngs, dtype=dtype) for _ in range(spec.modules)])

    @property
    def dtype(self) -> jnp.dtype:
        """That of what is not quantised."""
        return jax.tree.leaves(nnx.state(self.modules[0].norm))[0].dtype

    def __call__(
        self,
        target: CausalLM,
        features: jax.Array,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        counts: jax.Array | None = None,
        fresh: bool = False,
        module: int = 0,
        depths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The features that follow T of them in each row.

        Args:
          target: whose features they are; it embeds the tokens.
          features: `[B, T, d_model]`: at positions t = `cache.lengths`, and the T - 1 after it; what `hidden` of
            the target returned, or this.
          tokens: int32 `[B, T]`: those at t + 1.
          cache: what came before; None: nothing came before and nothing is kept. Modules keep keys of their own and
            share `lengths`: a second module reads the same positions from a cache rolled back by T.
          counts: int32 `[B]`, real columns of each row; None: all.
          fresh: static; the cache is empty in every row.
          module: static, less than the modules there are.
          depths: int32 `[T]`; columns are nodes of a tree that stand so far after position t; None: 0 to T - 1.

        Returns:
          `([B, T, d_model]`: features at t + 1, the cache after or None`)`.

        Raises:
          InputError: there is no such module, or the target is of another width.
        """
        spec = self.spec
        if not 0 <= module < spec.modules:
            raise InputError(f"module={module} must be at least 0 and below modules={spec.modules}")
        if target.spec.d_model != spec.d_model:
            raise InputError(
                f"the head is for features of d_model={spec.d_model}, but the target has {target.spec.d_model}: "
                "take the head that was trained for it"
            )
        starts = jnp.zeros((tokens.shape[0],), jnp.int32) if cache is None else cache.lengths
        depths = jnp.arange(tokens.shape[1], dtype=jnp.int32) if depths is None else depths
        positions = starts[:, None] + depths
        step = Step(positions, counts, fresh)
        embedded = target.embedded(tokens, positions + 1).astype(features.dtype)
        caches = (None,) * spec.blocks if cache is None else cache.layers[module]
        with alone():
            out, after = self.modules[module](features, embedded, step, caches)
        if cache is None:
            return out, None
        layers = (*cache.layers[:module], after, *cache.layers[module + 1 :])
        return out, Cache(layers, step.totals)

    def init_cache(
        self, batch: int, capacity: int, *, dtype=None, max_append: int = 1, kind: Kind | None = None
    ) -> Cache:
        """An empty cache of all modules; the arguments are those of `CausalLM.init_cache`."""
        dtype = self.dtype if dtype is None else dtype
        with alone():
            return init_cache(self.spec.stacks(), batch, capacity, dtype=dtype, max_append=max_append, kind=kind)
