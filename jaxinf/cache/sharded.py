"""Caches that several chips hold together: striped by tokens, or split by rows of the batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.cache.base import DECODE_TOKENS, AttentionRule, LayerCache, Step, as_read, attend_alone, to_store
from jaxinf.cache.dense import DenseCache
from jaxinf.cache.kinds import Kind, empty
from jaxinf.cache.rolling import RollingCache
from jaxinf.cache.store import Store
from pallas_kernels import flash_attention
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.merge import add_partial
from sharding import stripes, zigzag
from sharding.collectives import index, size
from sharding.groups import Group
from sharding.sequence import add_sinks, finish, merge_chips

_NO_TREES = "caches striped over chips take chains of drafted tokens, not trees: take a drafter of chains"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceSharded(LayerCache):
    """Every token, striped over chips: those of `sequence`, and groups of neighbours along `tensor`.

    Token p lies on chip p mod n, in slot p // n, for n = sequence * group. Each chip attends to what it holds, and
    the results merge by their log-sum-exps (Flash-Decoding, Dao et al. 2023, across chips). Everything follows from
    the rows' lengths, so tokens are taken back by lowering those.

    store: of S / n slots on each chip.
    chips: n. group: chips of `tensor` that share a key head; each has its own query heads.
    """

    store: Store
    chips: int = dataclasses.field(metadata=dict(static=True))
    group: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def zeros(
        cls,
        layers: int | None,
        batch: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype,
        *,
        group: int = 1,
        kind: Kind | None = None,
    ) -> SequenceSharded:
        """For the mesh in context; `slots` are those of one chip."""
        return cls(empty((layers, batch, kv_heads, slots, head_dim), dtype, kind), size("sequence") * group, group)

    @property
    def _chip(self) -> jax.Array:
        return index("sequence") + size("sequence") * Group(self.group).index

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        if step.tree is not None:
            raise UnsupportedError(_NO_TREES)
        if rule.window is not None:
            raise UnsupportedError("SequenceSharded sees all tokens: layers with a window take a RollingCache.")
        if size("sequence") * self.group != self.chips:
            raise UnsupportedError(
                f"the cache was made for sequence={self.chips // self.group}, but the mesh has "
                f"sequence={size('sequence')}: make it under the mesh that uses it."
            )
        q, cache = rule.turn(q, step.positions), self.append(k, v, step, rule, layer)
        tokens = q.shape[2]
        if tokens > 1:
            k, v = self.as_read(k, v, step, rule)
        if step.fresh and tokens > 1:
            return attend_alone(q, k, v, step, rule), cache
        # One token alone finds itself in the cache. Several are not all on one chip, so the cache gives what came
        # before them, and each chip adds what they see of each other.
        held = step.totals if tokens == 1 else step.starts
        out, lse = self._merge(*cache._held(q, held, step, rule, layer))
        if tokens > 1:
            alone = dataclasses.replace(rule, sinks=None)
            few: dict[str, Any] = dict(implementation="reference") if tokens <= DECODE_TOKENS else {}
            new = flash_attention(q, k, v, lengths=step.counts, return_lse=True, **alone.mask, **few)
            out, lse = add_partial((out, lse), new)
        if rule.sinks is not None:
            out = add_sinks(out, lse, rule.sinks)
        return out.astype(q.dtype), cache

    def as_read(self, k, v, step: Step, rule: AttentionRule) -> tuple[jax.Array, jax.Array]:
        if not self.store.grouped:
            return as_read(self.store, k, v, step, rule)
        if step.fresh:
            k = self._rounded_stripes(k, step)
        return rule.turn(k, step.positions), self.store.rounded_values(v)

    def _rounded_stripes(self, k, step: Step) -> jax.Array:
        """Keys of a pass that starts its rows, those of each chip rounded together."""
        k = zigzag.whole(k, 2) if step.zigzag else k
        batch, heads, tokens, dim = k.shape
        chips = jnp.arange(self.chips)
        each = jnp.pad(k, ((0, 0), (0, 0), (0, -tokens % self.chips), (0, 0)))
        each = jnp.moveaxis(each.reshape(batch, heads, -1, self.chips, dim), 3, 0)
        counts = stripes.slots(step.totals[None], chips[:, None], self.chips)
        zeros = jnp.zeros((batch,), jnp.int32)
        each = jax.vmap(lambda k, counts: self.store.rounded_keys(k, zeros, counts))(each, counts)
        k = jnp.moveaxis(each, 0, 3).reshape(batch, heads, -1, dim)[:, :, :tokens]
        return zigzag.share(k, 2) if step.zigzag else k

    def append(self, k, v, step: Step, rule: AttentionRule, layer) -> SequenceSharded:
        k = to_store(self.store, k, step, rule)
        chip, chips = self._chip, self.chips
        if step.zigzag:
            k, v = (stripes.from_zigzag(x) for x in (k, v))
            # Now they are striped over `sequence`; of those, every group-th is this chip's.
            near = Group(self.group)
            k, v = (stripes.pick(x, step.starts, None, near.index, self.group)[0] for x in (k, v))
            starts, counts = step.starts, jnp.minimum(stripes.slots(step.totals, chip, chips), k.shape[2])
        else:
            k, starts, counts = stripes.pick(k, step.starts, step.counts, chip, chips)
            v = stripes.pick(v, step.starts, step.counts, chip, chips)[0]
        return dataclasses.replace(self, store=self.store.append(k, v, layer, starts, counts))

    def _held(self, q, held: jax.Array, step: Step, rule: AttentionRule, layer) -> tuple[jax.Array, jax.Array]:
        """What all query heads of the group see of the tokens before `held` that lie on this chip."""
        chip, chips, near = self._chip, self.chips, Group(self.group)
        q = near.gather(q, 1)
        batch, heads, tokens, dim = q.shape
        lengths = stripes.slots(held, chip, chips)
        slopes = None if rule.alibi_slopes is None else near.gather(rule.alibi_slopes, 0)
        mask: dict[str, Any] = dict(scale=rule.scale, softcap=rule.softcap, layer=layer, return_lse=True)
        mask["turn"] = lambda x, at: rule.turn(x, chips * at + chip)
        if tokens <= DECODE_TOKENS:
            # Tokens as heads: all of them see all of the slots.
            if slopes is not None:
                mask["alibi_slopes"] = jnp.repeat(chips * slopes, tokens)
            out, lse = self.store.decode(q.reshape(batch, heads * tokens, 1, dim), lengths, **mask)
            out, lse = out.reshape(batch, heads, tokens, -1), lse.reshape(batch, heads, tokens)
            query = lengths[:, None] - 1  # where that query stood, in slots
        else:
            if slopes is not None:
                mask["alibi_slopes"] = chips * slopes
            out, lse = self.store.attend(q, causal=False, lengths=lengths, **mask)
            query = jnp.arange(tokens)[None]
        if slopes is not None:
            # Biases by distance came out as if the query stood in that slot, and not where it does.
            moved = (chips * query + chip - step.positions).astype(jnp.float32)
            lse = lse + slopes[:, None] * moved[:, None]
        return out, lse

    def _merge(self, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This chip's query heads over all chips' tokens, float32."""
        out, lse = merge_chips(out, lse, "sequence")
        if self.group == 1:
            return out, lse
        near = Group(self.group)
        top = near.max(lse)
        safe = jnp.where(jnp.isneginf(top), 0.0, top)
        weight = jnp.exp(lse - safe)
        return finish(near.scatter(out * weight[..., None], 1), near.scatter(weight, 1), near.part(safe, 1))

    def commit(self, starts, path, counts) -> SequenceSharded:
        raise UnsupportedError(_NO_TREES)

    def map_rows(self, change) -> SequenceSharded:
        return dataclasses.replace(self, store=self.store.map_rows(change))

    @property
    def append_limit(self) -> int | None:
        return self.store.append_limit

    @property
    def capacity(self) -> int | None:
        return self.store.slots * self.chips


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchSharded(LayerCache):
    """Rows split over a group of neighbours along `tensor` that share a key head (Pope et al. 2023, section 3.3).

    At each step queries go from chips that have heads to chips that have rows, attend there, and go back. A pass
    that starts its rows needs no exchange: each chip has the new keys of all rows, and keeps its own rows' ones.

    rows: the cache of B / group rows, for as many query heads as the group has together.
    """

    rows: DenseCache | RollingCache | SequenceSharded
    group: int = dataclasses.field(metadata=dict(static=True))

    def step(self, q, k, v, step: Step, rule: AttentionRule, *, layer=None):
        near = Group(self.group)
        counts = None if step.counts is None else near.part(step.counts, 0)
        tree = None if step.tree is None else near.part(step.tree, 0)
        own = dataclasses.replace(step, positions=near.part(step.positions, 0), counts=counts, tree=tree)
        if not self.rows.store.grouped:
            q, k = rule.turn(q, step.positions), rule.turn(k, step.positions)
            rule = dataclasses.replace(rule, rotate=None)
        own_k, own_v = near.part(k, 0), near.part(v, 0)
        if step.fresh and step.tokens > 1:
            limits = [w for w in (rule.window, self.rows.window) if w is not None]
            alone = dataclasses.replace(rule, window=min(limits, default=None))
            k, v = self.rows.as_read(k, v, step, rule)
            out = attend_alone(rule.turn(q, step.positions), k, v, step, alone)
            return out, self._with(self.rows.append(own_k, own_v, own, self._of_rows(rule), layer))
        sinks, slopes = (None if x is None else near.gather(x, 0) for x in (rule.sinks, rule.alibi_slopes))
        rule = dataclasses.replace(self._of_rows(rule), sinks=sinks, alibi_slopes=slopes)
        out, rows = self.rows.step(near.exchange(q, 0, 1), own_k, own_v, own, rule, layer=layer)
        return near.exchange(out, 1, 0), self._with(rows)

    def _of_rows(self, rule: AttentionRule) -> AttentionRule:
        """The rule for this chip's rows: a rotation may depend on the lengths of all of them."""
        rotate, near = rule.rotate, Group(self.group)
        if rotate is None:
            return rule

        def turn(x: jax.Array, at: jax.Array) -> jax.Array:
            everyone = rotate(*(jnp.concatenate([part] * self.group) for part in (x, at)))
            return near.part(everyone, 0)

        return dataclasses.replace(rule, rotate=turn)

    def commit(self, starts, path, counts) -> BatchSharded:
        near = Group(self.group)
        return self._with(self.rows.commit(*(near.part(x, 0) for x in (starts, path, counts))))

    def _with(self, rows: DenseCache | RollingCache | SequenceSharded) -> BatchSharded:
        return dataclasses.replace(self, rows=rows)

    def take(self, rows: jax.Array) -> BatchSharded:
        """The rows come from wherever in the group they are; their number must be a multiple of the group's size.

        A shard of the cache at a time goes round, so this holds three of them.
        """
        near = Group(self.group)
        if rows.shape[0] % self.group:
            raise UnsupportedError(f"{rows.shape[0]} rows do not divide over groups of {self.group} chips.")
        wanted = near.part(rows, 0)

        def one(x: jax.Array, axis: int) -> jax.Array:
            each = x.shape[axis]
            shape = [1] * x.ndim
            shape[axis] = -1
            taken = None
            for step in range(self.group):
                source = (near.index - step) % self.group
                found = jnp.take(x, wanted % each, axis=axis)
                here = (wanted // each == source).reshape(shape)
                taken = found if taken is None else jnp.where(here, found, taken)
                x = near.rotate(x) if step < self.group - 1 else x
            assert taken is not None
            return taken

        return self._with(self.rows.map_rows(one))

    def map_rows(self, change) -> BatchSharded:
        return self._with(self.rows.map_rows(change))

    @property
    def append_limit(self) -> int | None:
        return self.rows.append_limit

    @property
    def capacity(self) -> int | None:
        return self.rows.capacity
