"""Scales that move from a product's inputs to its matrix, and the model computes the same.

    x W = (x / s) (s W)         s: one number a channel of x

x / s comes from what makes x: a norm's scale and bias, or the columns of the matrix before. Where x feeds several
matrices all have the same s; where it feeds anything else, or something that is not linear stands between, there is
no fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.compression.schemes import name_of
from jaxinf.compression.walking import Walk
from jaxinf.layers import Block, Gated, LayerSpec, MoESpec
from jaxinf.layers.ffn import ActivationSpec, Plain
from jaxinf.models import CausalLM
from pallas_kernels.errors import InputError

Weights = dict[str, Any]
"""A block's parameters by name: "attention.query" is the kernel `[K, N]`, "attention.query.bias" its bias."""


@dataclass(frozen=True)
class Fold:
    """Where a scale a channel can move.

    kind: "norm": from the norm `source` (scale, bias); "columns": from the columns (and bias) of matrix `source`.
    into: matrices whose rows take it.
    repeat: None, or for each row of `into` the channel of `source` that it reads (grouped queries share a value).
    """

    kind: Literal["norm", "columns"]
    source: str
    into: tuple[str, ...]
    repeat: tuple[int, ...] | None = None
    offset: float = 0.0

    def spread(self, s: jax.Array) -> jax.Array:
        """From `[..., channels of source]` to `[..., rows of into]`."""
        return s if self.repeat is None else s[..., np.asarray(self.repeat)]

    def gather(self, of_rows: jax.Array, reduce) -> jax.Array:
        """The reverse for statistics: `reduce(array, axis)` over the rows that read one channel."""
        if self.repeat is None:
            return of_rows
        order = np.argsort(np.asarray(self.repeat), kind="stable")
        channels = max(self.repeat) + 1
        return reduce(of_rows[..., order].reshape(*of_rows.shape[:-1], channels, -1), axis=-1)

    def touches(self, name: str) -> bool:
        """Whether `apply` reads or changes a parameter of the block."""
        own = ("scale", "bias") if self.kind == "norm" else ("bias",)
        return name in (self.source, *self.into, f"{self.source}_bias", *(f"{self.source}.{of}" for of in own))

    def apply(self, weights: Weights, s: jax.Array) -> jax.Array:
        """Divides the source by `s [..., channels]` and multiplies the rows of `into`, in place; gives s.

        Matrices become float32; a norm keeps its dtype, and s is adjusted to what that can hold.
        """
        if self.kind == "norm":
            s = self._norm(weights, s)
        else:
            weights[self.source] = weights[self.source].astype(jnp.float32) / s[..., None, :]
            self._bias(weights, f"{self.source}{_bias_suffix(self.source)}", s)
        rows = self.spread(s)[..., :, None]
        for name in self.into:
            weights[name] = weights[name].astype(jnp.float32) * rows
        return s

    def _norm(self, weights: Weights, s: jax.Array) -> jax.Array:
        old = weights[f"{self.source}.scale"]
        whole = old.astype(jnp.float32) + self.offset
        new = (whole / s - self.offset).astype(old.dtype)
        weights[f"{self.source}.scale"] = new
        kept = new.astype(jnp.float32) + self.offset
        s = jnp.where((kept == 0) | (whole == 0), s, whole / jnp.where(kept == 0, 1, kept))
        self._bias(weights, f"{self.source}.bias", s)
        return s

    def _bias(self, weights: Weights, name: str, s: jax.Array) -> None:
        if name in weights:
            bias = weights[name]
            weights[name] = (bias.astype(jnp.float32) / s).astype(bias.dtype)


def _bias_suffix(matrix: str) -> str:
    return "_bias" if ".experts." in matrix else ".bias"


def folds(spec: LayerSpec) -> tuple[Fold, ...]:
    """All folds of a layer: norms into what they feed, values into the output, up into down."""
    found = []
    attention = tuple(f"attention.{n}" for n in ("query", "key", "value"))
    before = _fed(spec)
    offset = getattr(spec.norm, "offset", 0.0)
    if spec.placement in ("pre", "sandwich", "parallel_two_norms"):
        found += [
            Fold("norm", "attention_norm", attention, offset=offset),
            Fold("norm", "ffn_norm", before, offset=offset),
        ]
    elif spec.placement == "parallel":
        found.append(Fold("norm", "attention_norm", attention + before, offset=offset))
    a = spec.attention
    if a.clip is None:
        rows = np.arange(a.heads * a.head_dim).reshape(a.heads, a.head_dim)
        shared = np.arange(a.heads)[:, None] // (a.heads // a.kv_heads) * a.head_dim + rows % a.head_dim
        found.append(Fold("columns", "attention.value", ("attention.out",), tuple(shared.reshape(-1).tolist())))
    for at, activation in _feeds(spec):
        if isinstance(activation, Gated) or activation == Plain("relu"):
            found.append(Fold("columns", f"{at}.up", (f"{at}.down",)))
    return tuple(found)


def _feeds(spec: LayerSpec) -> list[tuple[str, ActivationSpec]]:
    f = spec.ffn
    if not isinstance(f, MoESpec):
        return [("ffn", f.activation)]
    shared = [] if f.shared is None else [("ffn.shared", f.shared.activation)]
    return [("ffn.experts", f.activation), *shared]


def _fed(spec: LayerSpec) -> tuple[str, ...]:
    """The matrices that a feed-forward part's input meets."""
    found = [f"{at}.{n}" for at, a in _feeds(spec) for n in (("up", "gate") if a.gated else ("up",))]
    if isinstance(spec.ffn, MoESpec):
        found += ["ffn.router"] + (["ffn.shared_gate"] if spec.ffn.shared_gate else [])
    return tuple(found)


def weights_of(block: Block) -> Weights:
    """A block's parameters by name."""
    return {name_of(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(block))}


def with_weights(block: Block, weights: Mapping[str, Any]) -> Block:
    """A block like this one with other parameters; floats in the dtype that they had."""
    graph, state = nnx.split(block)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value, old = weights[name_of(path)], variable.get_value()
        plain = isinstance(value, jax.Array) and hasattr(old, "dtype")
        flat.append((path, variable.replace(value.astype(old.dtype) if plain else value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def plant_outliers(model: CausalLM, channels: Sequence[int], factor: float = 30.0) -> CausalLM:
    """The model with outliers in some channels of what its norms give, which computes the same up to rounding.

    Large language models have such channels (Dettmers et al. 2022, arXiv:2208.07339, section 4), small ones do not:
    this is for tests of methods that are to cope with them. In every layer the norms before attention and
    feed-forward parts grow by `factor` in these channels, and the rows that meet them shrink.

    Args:
      channels: of the residual stream, 0 to d_model - 1.

    Raises:
      InputError: no such channel, or no layer has a norm that feeds matrices alone.
    """
    wrong = [c for c in channels if not 0 <= c < model.spec.d_model]
    if wrong or not channels:
        raise InputError(f"channels={list(channels)} must be some of 0 to {model.spec.d_model - 1}")
    if not any(f.kind == "norm" for layer in model.spec.layers() for f in folds(layer)):
        raise InputError("no norm of the model feeds matrices alone, so outliers cannot be planted; take another")
    s = jnp.ones(model.spec.d_model).at[jnp.asarray(channels)].set(1 / factor)

    def planted(block: Block) -> Block:
        weights = weights_of(block)
        for fold in folds(block.spec):
            if fold.kind == "norm":
                fold.apply(weights, s)
        return with_weights(block, weights)

    walk = Walk(model)
    for i in range(model.spec.depth):
        walk.put(i, planted(walk.block(i)))
    return walk.finished()
