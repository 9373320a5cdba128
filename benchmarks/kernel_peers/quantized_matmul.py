"""What XLA makes of the same products written in `jax.numpy`: JAX ships no kernel for them."""

import jax
import jax.numpy as jnp

from pallas_kernels.named import Call
from pallas_kernels.quantized_matmul.cases import Case


def peer(case: Case) -> list[tuple[str, Call]]:
    if case.transpose or len(case.lead) != 1:
        return []
    ours = case.call()
    return [("XLA dot", Call(_bytes if case.activations else _widened, ours.args, ours.work))]


def _widened(x: jax.Array, w: jax.Array, scales: jax.Array | None) -> jax.Array:
    if scales is not None and scales.ndim == 2:
        wide = w.astype(jnp.float32).reshape(scales.shape[0], -1, w.shape[1]) * scales[:, None]
        return x @ wide.reshape(w.shape).astype(x.dtype)
    out = jax.lax.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return (out if scales is None else out * scales).astype(x.dtype)


def _bytes(x: jax.Array, w: jax.Array, scales: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=1, keepdims=True) / 127
    rounded = jnp.round(wide / scale).astype(jnp.int8)
    out = jax.lax.dot(rounded, w, preferred_element_type=jnp.int32)
    return (out.astype(jnp.float32) * scale * scales).astype(x.dtype)
