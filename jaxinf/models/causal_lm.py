"""The one decoder-only language model, built of segments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.cache import Cache, Kind, LayerCache, Step, check_kind, layer_cache
from jaxinf.core.stacked import Stacked
from jaxinf.layers import Block, Embedding, LayerSpec, Linear
from jaxinf.layers.ahead import Unsummed
from jaxinf.layers.parameters import is_in_place
from jaxinf.models.pipeline import in_stages, micro_batches, through_stages
from jaxinf.models.spec import ModelSpec
from jaxinf.models.spec import Segment as SegmentSpec
from pallas_kernels import chips
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.stored import storage_dtype
from sharding import split_axis, zigzag
from sharding.collectives import size

Layout = Literal["list", "stacked"]


class Segment(nnx.Module):
    """A period of blocks, repeated.

    "list": `blocks` holds every layer; a Python loop runs them (the fast form on a CPU). "stacked": `blocks`
    holds one block a slot of the period, its parameters stacked along a leading axis of `repeats`; a
    `lax.scan` runs them with the caches in the carry (deep models compile in seconds, caches stay in place). Where
    a mesh's `pipeline` has cut the stack, its stages take turns (`jaxinf.models.pipeline`).
    """

    def __init__(self, spec: SegmentSpec, d_model: int, *, layout: Layout, rngs: nnx.Rngs, dtype):
        self.spec, self.layout = spec, layout

        rows = [[Block(x, d_model, rngs=rngs, dtype=dtype) for x in spec.period] for _ in range(spec.repeats)]
        if layout == "list":
            self.blocks = nnx.List([block for row in rows for block in row])
        else:
            self.blocks = nnx.List([stack(slot) for slot in zip(*rows, strict=True)])

    def __call__(
        self,
        x: jax.Array,
        step: Step,
        caches: tuple[LayerCache, ...] | None,
        segment_ids=None,
        skip: frozenset[int] = frozenset(),
    ) -> tuple[jax.Array, tuple[LayerCache, ...] | None, jax.Array]:
        """skip: static; layers of the segment that are left out, with their caches as they are."""
        run = self._list if self.layout == "list" else self._stacked
        return run(x, step, caches, segment_ids, skip)

    def _list(self, x, step, caches, segment_ids, skip):
        after, losses = [], [jnp.zeros((), jnp.float32)]
        for i, (block, cache) in enumerate(zip(self.blocks, caches or [None] * len(self.blocks), strict=True)):
            if i not in skip:
                x, cache, loss = block(x, step, cache, segment_ids=segment_ids)
                losses.append(loss)
            after.append(cache)
        return x, tuple(after) if caches is not None else None, jnp.sum(jnp.stack(losses))

    def _stacked(self, x, step, caches, segment_ids, skip):
        # Only without gradients: those of what the loop does not cut would be as large as the stack at every layer.
        whole = is_in_place if caches is not None else lambda path, value: False
        split = [nnx.split(block, whole, ...) for block in self.blocks]
        repeats = jax.tree.leaves(split[0][1:])[0].shape[0]  # of a pipeline's stage, those that it has
        kept = self._kept(skip, whole=repeats == self.spec.repeats) if skip else None

        def run(x, step, caches, segment_ids, first):
            late = caches is not None and all(b.leaves_sums(x.shape[0] * x.shape[1]) for b in self.blocks)

            def body(carry, xs):
                x, caches, loss, turn = carry
                layer, states = turn if kept is None else kept[turn], xs
                if states is None:
                    states = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cut)
                after = []
                for slot, ((graph, stacks, _), state) in enumerate(zip(split, states, strict=True)):
                    cache = None if caches is None else caches[slot]
                    block = nnx.merge(graph, jax.tree.map(lambda stack: Stacked(stack, layer), stacks), state)
                    at = layer if first is None else first + layer
                    if isinstance(x, Unsummed):
                        x, cache, extra = block.settling(x, step, cache, layer=at)
                    else:
                        x, cache, extra = block(x, step, cache, layer=at, segment_ids=segment_ids)
                    after.append(cache)
                    loss = loss + extra
                return (x, tuple(after) if caches is not None else None, loss, turn + 1), None

            cut = [state for _, _, state in split]
            start = (Unsummed.of(x) if late else x, caches, jnp.zeros((), jnp.float32), jnp.int32(0))
            given, turns = (cut, repeats) if kept is None else (None, len(kept))
            (x, caches, loss, _), _ = jax.lax.scan(body, start, given, length=turns)
            return x.settle()[0] if isinstance(x, Unsummed) else x, caches, loss

        if repeats == self.spec.repeats:
            return run(x, step, caches, segment_ids, None)
        parts = micro_batches(x.shape[0], self.spec)
        return through_stages(run, x, step, caches, segment_ids, layers=repeats, parts=parts)

    def _kept(self, skip: frozenset[int], *, whole: bool) -> jax.Array:
        """The repeats that are left, int32 `[n]`, of a stack that stages have not cut unless `whole` is False."""
        if not whole:
            raise UnsupportedError(
                "layers cannot be skipped where a mesh's pipeline cuts their stack: use pipeline=1"
            )
        period = len(self.spec.period)
        rows = [{*range(i * period, (i + 1) * period)} for i in range(self.spec.repeats)]
        if any(0 < len(row & skip) < period for row in rows):
            raise UnsupportedError(
                f'a model of layout="stacked" skips whole periods of {period} layers, which layers '
                f'{sorted(skip)} of a segment are not: skip those of whole periods, or take layout="list"'
            )
        return jnp.array([i for i, row in enumerate(rows) if not row <= skip], jnp.int32)


class CausalLM(nnx.Module):
    """Tokens to logits. All families are this class with another `ModelSpec`."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs, param_dtype=jnp.float32, layout: Layout = "list"):
        self.spec = spec
        self.layout: Layout = layout
        d = spec.d_model
        make: dict[str, Any] = dict(rngs=rngs, dtype=param_dtype)
        self.embed = Embedding(spec.vocab, d, axes=("vocab", "embed"), **make)
        entries = spec.learned_positions
        self.positions = None if entries is None else Embedding(entries, d, axes=(None, "embed"), **make)
        self.embed_norm = _norm(spec.embed_norm, d, param_dtype)
        self.segments = nnx.List([Segment(s, d, layout=layout, **make) for s in spec.segments])
        self.final_norm = _norm(spec.final_norm, d, param_dtype)
        make["bias"] = spec.head_bias
        self.head = None if spec.tied else Linear(d, spec.vocab, axes=("embed", "vocab"), **make)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations: that of the embedding."""
        return self.embed.table[...].dtype

    @property
    def own_vocab(self) -> int:
        """Entries of the vocabulary that this chip of a mesh has, padding included; all of them without a mesh."""
        return -(-self.spec.vocab // size("tensor"))

    def hidden(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        counts: jax.Array | None = None,
        fresh: bool = False,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        tree: jax.Array | None = None,
        skip: Collection[int] = (),
        ahead: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, jax.Array]:
        """Final hidden states of T new tokens a row.

        Args:
          tokens: int32 `[B, T]`; row b's first `counts[b]` are real, the rest padding.
          cache: what came before; None: nothing came before and nothing is kept.
          counts: int32 `[B]`; None: all T.
          fresh: static; the cache is empty in every row (its content is then not read).
          segment_ids: int32 `[B, T]`; tokens see their own segment alone. Without a cache only.
          positions: int32 `[B, T]`; default: consecutive. Without a cache only.
          tree: bool `[B, T, T]`; the tokens are nodes of a tree, as in `Step`. With a cache only, of which
            `Cache.commit` then keeps a branch: lengths after the pass are those of all nodes.
          skip: static; indices of layers that are left out, whose caches stay as they are. Where layers are
            stacked, whole periods.
          ahead: `[A, d_model]`; the last A columns have these embeddings in place of their tokens'. Not for a pass
            that `zigzag.splits`.

        Returns:
          `(hidden [B, T, d_model], the cache after or None, the mixtures' balancing loss)`. Where `zigzag.splits(T,
          cache is None or fresh)`, hidden is of this chip's tokens alone, `[B, T / chips rounded up, d_model]`:
          `zigzag.take_last` and `zigzag.whole` undo it.
        """
        if cache is not None and not (segment_ids is None and positions is None):
            raise InputError("segment_ids and positions are for passes without a cache; leave out one or the other")
        starts = jnp.zeros((tokens.shape[0],), jnp.int32) if cache is None else cache.lengths
        if positions is None:
            places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = starts[:, None] + (places if tree is None else jnp.sum(tree, -1, dtype=jnp.int32) - 1)
        if split := zigzag.splits(tokens.shape[1], cache is None or fresh):
            total = tokens.shape[1]
            tokens, positions = zigzag.share(tokens), zigzag.share(positions)
            segment_ids = None if segment_ids is None else zigzag.share(segment_ids)
            if counts is None and tokens.shape[1] * size("sequence") != total:
                counts = jnp.full_like(starts, total)
        step = Step(positions, counts, fresh, split, tree)

        x = self.embedded(tokens, positions, ahead)
        layers, loss = [], jnp.zeros((), jnp.float32)
        first = 0
        for i, segment in enumerate(self.segments):
            left = frozenset(layer - first for layer in skip if first <= layer < first + segment.spec.layers)
            first += segment.spec.layers
            x, after, extra = segment(x, step, None if cache is None else cache.layers[i], segment_ids, left)
            layers.append(after)
            loss = loss + extra
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x, None if cache is None else Cache(tuple(layers), step.totals), loss

    def embedded(self, tokens: jax.Array, positions: jax.Array, ahead: jax.Array | None = None) -> jax.Array:
        """What the first layer gets: int32 `[B, T]` tokens and their positions -> `[B, T, d_model]`. ahead: as for
        `hidden`."""
        x = self.embed(tokens)
        if self.spec.embed_scale != 1.0:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        if ahead is not None:
            x = x.at[:, x.shape[1] - ahead.shape[0] :].set(ahead.astype(x.dtype))
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., d_model]` -> float32 `[..., vocab]`; on a mesh, this chip's part of it, its padding -inf."""
        if self.head is None:
            y = self.embed.attend(hidden)
        else:
            y = self.head(hidden, out=jnp.float32)
        if self.spec.logit_scale != 1.0:
            y = y * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            y = self.spec.logit_softcap * jnp.tanh(y / self.spec.logit_softcap)
        if size("tensor") * self.own_vocab != self.spec.vocab:
            place = split_axis.first_entry(y) + jnp.arange(self.own_vocab)
            y = jnp.where(place < self.spec.vocab, y, -jnp.inf)
        return y

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of whole sequences without a cache: int32 `[B, T]` -> float32 `[B, T, vocab]`."""
        return self.train_logits(tokens)[0]

    def train_logits(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`(logits float32 [B, T, vocab], the mixtures' balancing loss)`."""
        hidden, _, loss = self.hidden(tokens)
        logits = self.logits(hidden)
        if zigzag.splits(tokens.shape[1], True):
            logits = zigzag.whole(logits, total=tokens.shape[1])
        return logits, loss

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype=None,
        max_append: int = 1,
        window: int | None = None,
        sinks: int = 0,
        kind: Kind | None = None,
    ) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens.

        Args:
          capacity: tokens; layers with a window store less where that is enough. For TPUs sizes are rounded up to
            whole tiles of 128 slots.
          dtype: of keys and values; default: the model's. For a CPU bfloat16 is stored as its bits, uint16, which
            alone can be written in place there; a mesh of described TPUs in context means TPUs.
          max_append: tokens that one pass may append and then take back (1 for plain decoding).
          window, sinks: bound the memory of layers that see everything to the latest `window` tokens and the
            first `sinks` (StreamingLLM).
          kind: "int8", "fp8" or "int4": keys and values in fewer bits (docs/quantization.md); None: in `dtype`.

        Raises:
          InputError: sizes below 1, `sinks` without `window`, or no such kind.
        """
        return init_cache(
            self.spec,
            batch,
            capacity,
            dtype=self.dtype if dtype is None else dtype,
            layout=self.layout,
            max_append=max_append,
            window=window,
            sinks=sinks,
            kind=kind,
        )


def init_cache(
    spec: ModelSpec,
    batch: int,
    capacity: int,
    *,
    dtype,
    layout: Layout = "list",
    max_append: int = 1,
    window: int | None = None,
    sinks: int = 0,
    kind: Kind | None = None,
) -> Cache:
    """See `CausalLM.init_cache`."""
    for name, value in dict(batch=batch, capacity=capacity, max_append=max_append).items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if sinks < 0 or (sinks and window is None):
        raise InputError(f"sinks={sinks} must be at least 0 and needs a window (window={window})")
    if window is not None and window < 1:
        raise InputError(f"window={window} must be at least 1, or None")
    check_kind("kind", kind)

    dtype = storage_dtype(dtype, chips.platform())

    def one(layer: LayerSpec, layers: int | None, rows: int = batch) -> LayerCache:
        a = layer.attention
        return layer_cache(
            layers,
            rows,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            capacity=capacity,
            dtype=dtype,
            max_append=max_append,
            window=a.window,
            bound=window,
            sinks=0 if a.window is not None else sinks,
            kind=kind,
        )

    def segment(i: int, s: SegmentSpec) -> tuple[LayerCache, ...]:
        if layout == "list":
            return tuple(one(layer, None) for _ in range(s.repeats) for layer in s.period)
        if size("pipeline") == 1 or not in_stages(spec, i):
            return tuple(one(layer, s.repeats) for layer in s.period)
        parts = micro_batches(batch, s)
        return tuple(one(layer, s.repeats // size("pipeline") * parts, batch // parts) for layer in s.period)

    layers = tuple(segment(i, s) for i, s in enumerate(spec.segments))
    return Cache(layers, jnp.zeros((batch,), jnp.int32))


def stack(blocks: Sequence[Block]) -> Block:
    """Blocks of the same spec as one whose parameters have a leading axis, one entry a block."""
    graph, *_ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def _norm(spec, d: int, dtype) -> nnx.Module | None:
    return None if spec is None else spec.build(d, dtype=dtype, axes=("embed",))
