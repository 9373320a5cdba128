"""The differentiable op behind `flash_attention`: an implementation forward, block by block in XLA backward."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.flash_attention.blocks import Blocks
from pallas_kernels.flash_attention.kernel import pallas, unsupported
from pallas_kernels.flash_attention.reference import reference
from pallas_kernels.flash_attention.tiles import Plan
from pallas_kernels.flash_attention.xla import xla
from pallas_kernels.flash_attention.xla_backward import backward
from pallas_kernels.flash_attention.xla_blocks import XlaBlocks
from pallas_kernels.masks import Rules

Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Options:
    """What is fixed while tracing. `offset` is the position of the first query, where it is known."""

    implementation: Implementation | None
    scale: float
    softcap: float | None
    offset: int | None
    blocks: Blocks | XlaBlocks | None

    @property
    def plan(self) -> Plan:
        return Plan(self.scale, self.softcap, self.blocks if isinstance(self.blocks, XlaBlocks) else None)


def one_layer(x: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Layer `layer` of x, or x itself."""
    return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)


def _of_one_layer(form):
    return lambda q, k, v, *rest: form(q, one_layer(k, rest[-1]), one_layer(v, rest[-1]), *rest[:-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, sinks, slopes, rules: Rules, layer) -> Pair:
    maths = dict(scale=options.scale, softcap=options.softcap)
    sizes = options.blocks if isinstance(options.blocks, Blocks) else None
    return dispatch(
        "flash_attention",
        options.implementation,
        q,
        k,
        v,
        sinks,
        slopes,
        rules,
        layer,
        reference=_of_one_layer(partial(reference, **maths)),
        xla=_of_one_layer(partial(xla, options.plan)),
        pallas=partial(pallas, **maths, offset=options.offset, blocks=sizes),
        unsupported=unsupported(q.dtype, q.shape[3], v.shape[-1], rules),
    )


def _save(options: Options, *arrays):
    results: Pair = _attend(options, *arrays)
    return results, (arrays, results)


def _gradients(options: Options, saved, cotangents):
    (q, k, v, sinks, slopes, rules, layer), results = saved
    own = q, one_layer(k, layer), one_layer(v, layer), sinks, slopes, rules
    dq, dk, dv, *rest = backward(options.plan, (*own, *results), cotangents)
    if layer is not None:
        dk, dv = (jnp.zeros_like(x).at[layer].set(dx) for x, dx in ((k, dk), (v, dv)))
    return dq, dk, dv, *rest, None


_attend.defvjp(_save, _gradients)
# The arguments and results of `reference`, and a layer where k and v are stacked.
# Jitted, so that the layers of a model share one trace.
attend = jax.jit(_attend, static_argnums=0)
