"""One layer at a time: text passes through, its matrices are quantised, and text passes through what became of it.

So each layer is calibrated with what the quantised layers before it give, and memory holds one layer, the moments
of its inputs and the text's hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.compression import awq, outliers, smoothquant
from jaxinf.compression.folding import Fold, Weights, folds, weights_of, with_weights
from jaxinf.compression.gptq import errors, gptq
from jaxinf.compression.observing import Stats, check_weight, run, statistics
from jaxinf.compression.scales import COARSE, refined, searched
from jaxinf.compression.schemes import Method, Target
from jaxinf.layers import Block
from jaxinf.quant import QTensor
from jaxinf.quant.formats import joined, split, to_whole
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class Settings:
    """Of the methods.

    alpha: SmoothQuant's: how much of an outlier moves into the weights, 0 to 1.
    threshold: LLM.int8()'s (`jaxinf.compression.outliers.THRESHOLD`); outliers: so many channels instead.
    act_order, damping: GPTQ's.
    """

    alpha: float = smoothquant.ALPHA
    threshold: float = outliers.THRESHOLD
    outliers: int | None = None
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha} must be between 0 and 1")
        if not self.threshold >= 0:
            raise InputError(f"threshold={self.threshold} must be at least 0")
        if self.outliers is not None and self.outliers < 1:
            raise InputError(f"outliers={self.outliers} must be at least 1, or None to go by the threshold")
        if not self.damping > 0:
            raise InputError(f"damping={self.damping} must be above 0")


def quantize_layer(
    block: Block,
    hidden: Sequence[np.ndarray],
    targets: Mapping[str, Target | None],
    *,
    at: str = "",
    settings: Settings | None = None,
) -> tuple[Block, list[np.ndarray]]:
    """A layer by itself with its matrices quantised, and what it gives for the text.

    Args:
      block: one layer, of concrete arrays (not a stack of layers).
      hidden: what it is given, some rows at a time, `[batch, length, d]` each.
      targets: what becomes of each matrix, by name within the model, as `plan` gives.
      at: the layer's name in it, such as "layers.3.".

    Raises:
      InputError: NaN or infinity in weights or in the inputs of a matrix, which it names.
    """
    settings = settings or Settings()
    weights, stats = folded(block, hidden, targets, at=at, settings=settings)
    new = with_weights(block, rounded(weights, stats, targets, at=at, settings=settings))
    return new, [np.asarray(run(new, jnp.asarray(x))[0]) for x in hidden]


def folded(
    block: Block,
    hidden: Sequence[np.ndarray],
    targets: Mapping[str, Target | None],
    *,
    at: str = "",
    settings: Settings,
) -> tuple[Weights, dict[str, Stats]]:
    """The first half of `quantize_layer`: weights that compute the same and are easier to round, and what they are
    given (nothing where no method asks)."""
    weights = weights_of(block)
    chosen = _chosen(weights, targets, at)
    for name in weights:
        check_weight(weights[name], f"{at}{name}")
    methods = {target.method for target in chosen.values()}
    if not methods - {"nearest"}:
        return weights, {}
    stats = statistics(block, hidden, gram=bool(methods & {"awq", "gptq"}), at=at)
    _fold(weights, block, stats, chosen, settings)
    return weights, stats


def rounded(
    weights: Weights,
    stats: Mapping[str, Stats],
    targets: Mapping[str, Target | None],
    *,
    at: str,
    settings: Settings,
) -> Weights:
    """The second half: the same with a `QTensor` for each matrix that has a target."""
    chosen = _chosen(weights, targets, at)
    return {
        name: _quantized(w, chosen[name], stats.get(name), settings) if name in chosen else w
        for name, w in weights.items()
    }


def _chosen(weights: Weights, targets: Mapping[str, Target | None], at: str) -> dict[str, Target]:
    found = {name: targets.get(f"{at}{name}") for name in weights}
    return {name: target for name, target in found.items() if target is not None}


def _fold(
    weights: Weights, block: Block, stats: dict[str, Stats], chosen: Mapping[str, Target], settings: Settings
) -> None:
    """Moves scales as the methods want, in `weights`, and what `stats` says of inputs with them."""
    for fold in folds(block.spec):
        own = [name for name in fold.into if name in chosen and chosen[name].method in ("awq", "smoothquant")]
        if not own:
            continue
        kinds: set[Method] = {chosen[name].method for name in own}
        search = _smooth if kinds == {"smoothquant"} else _salient
        s = search(fold, own, weights, stats, chosen, settings)
        touched = {name: w for name, w in weights.items() if fold.touches(name)}
        fed = {name: stats[name] for name in fold.into if name in stats}
        moved, scaled = _moved(fold, touched, fed, s)
        weights.update(moved)
        stats.update(scaled)


@partial(jax.jit, static_argnums=0)
def _moved(fold: Fold, weights: Weights, stats: dict[str, Stats], s: jax.Array):
    s = fold.spread(fold.apply(weights, s))
    return weights, {name: _scaled(of, s) for name, of in stats.items()}


def _scaled(stats: Stats, s: jax.Array) -> Stats:
    """Of inputs that are divided by s."""
    gram = stats.gram
    return Stats(
        stats.count,
        stats.largest / s,
        stats.total / s,
        stats.squares / s**2,
        None if gram is None else gram / s[..., :, None] / s[..., None, :],
    )


def _inputs(fold: Fold, name: str, stats: Mapping[str, Stats]) -> Stats:
    """Of what meets one of a fold's matrices: all experts' together where they share it."""
    return stats[name].together() if fold.kind == "norm" else stats[name]


def _smooth(fold: Fold, own: list[str], weights: Weights, stats, chosen, settings: Settings) -> jax.Array:
    largest = tuple(_inputs(fold, name, stats).largest for name in own)
    return _smoothed_channels(fold, settings.alpha, largest, tuple(weights[name] for name in own))


@partial(jax.jit, static_argnums=(0, 1))
def _smoothed_channels(fold: Fold, alpha: float, largest, matrices) -> jax.Array:
    if fold.kind == "norm":  # which experts share
        matrices = [jnp.moveaxis(w, -2, 0).reshape(w.shape[-2], -1) for w in matrices]
    rows = [jnp.max(jnp.abs(w.astype(jnp.float32)), axis=-1) for w in matrices]
    s = [fold.gather(jnp.max(jnp.stack(of), axis=0), jnp.max) for of in (list(largest), rows)]
    return smoothquant.scales(s[0], s[1], alpha)


def _salient(fold: Fold, own: list[str], weights: Weights, stats, chosen, settings: Settings) -> jax.Array:
    mean = _inputs(fold, own[0], stats).mean
    products = tuple((weights[name], stats[name].gram) for name in own)
    bits = tuple(chosen[name].bits for name in own)
    return _searched_channels(fold, tuple(chosen[name].group for name in own), bits, mean, products)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _searched_channels(fold: Fold, groups: tuple[int, ...], bits: tuple[int, ...], mean, products) -> jax.Array:
    """Scales `[..., channels]`, of those that AWQ tries; by expert where experts need not share them."""
    tried = awq.candidates(fold.gather(mean, jnp.mean))
    shared = tried.ndim == 2

    def loss(s: jax.Array) -> jax.Array:
        """What rounding adds to the squares of the outputs, with inputs divided by s."""
        s, total = fold.spread(s), jnp.zeros(())
        rows = s[..., :, None]
        for (w, gram), group, width in zip(products, groups, bits, strict=True):
            w = w.astype(jnp.float32)
            steps = searched(w * rows, gram / rows / s[..., None, :], group, width, COARSE)
            wide = _round(w * rows, steps, width) * jnp.repeat(steps, group, axis=-2) / rows
            found = errors(w, wide, gram)
            total = total + (jnp.sum(found) if shared else found)
        return total

    best = jnp.argmin(jax.lax.map(loss, tried), axis=0)
    return tried[best] if shared else jnp.take_along_axis(tried, best[None, :, None], axis=0)[0]


def _round(w: jax.Array, steps: jax.Array, bits: int) -> jax.Array:
    group = w.shape[-2] // steps.shape[-2]
    return joined(to_whole(split(w, group), steps[..., None, :], bits))


def _quantized(w: jax.Array, target: Target, stats: Stats | None, settings: Settings) -> QTensor:
    method = target.method if stats is not None else "nearest"
    if method in ("awq", "gptq"):
        assert stats is not None
        assert target.bits is not None
        values, steps = _calibrated(w, stats.gram, target.group, target.bits, method, settings)
        dtype = jnp.int8 if target.bits == 8 else jnp.int4
        return QTensor(values.astype(dtype), steps[..., 0, :] if steps.shape[-2] == 1 else steps)
    if method == "llm-int8":
        assert stats is not None
        return _with_outliers(w, target, stats, settings)
    q = jax.jit(target.format, static_argnums=1)(w, target.group)
    return dataclasses.replace(q, activations=target.activations)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _calibrated(w, gram, group: int, bits: int, method: Method, settings: Settings):
    w = w.astype(jnp.float32)
    # An expert that served no token is rounded as if all channels mattered alike.
    idle = jnp.trace(gram, axis1=-2, axis2=-1) == 0
    gram = jnp.where(idle[..., None, None], jnp.eye(gram.shape[-1]), gram)
    steps = searched(w, gram, group, bits)
    if method == "awq":
        steps = refined(w, gram, steps, bits)
        return _round(w, steps, bits), steps
    return gptq(w, gram, steps, bits, act_order=settings.act_order, damping=settings.damping), steps


def _with_outliers(w: jax.Array, target: Target, stats: Stats, settings: Settings) -> QTensor:
    inner = w.shape[-2]
    wide = settings.outliers or outliers.count(stats, settings.threshold)
    if wide == 0:
        q = target.format(w, target.group)
    else:
        threshold = None if settings.outliers else settings.threshold
        q = outliers.encode(w, stats, target.format, target.group, min(wide, inner), threshold)
    # Experts' rows come in one product with all of theirs: there, only the weights are narrow.
    return dataclasses.replace(q, activations=target.activations if w.ndim == 2 else None)
