"""`quantized_matmul` in plain XLA.

On TPU and GPU the compiler reads a narrow weight as it is inside its matmul, so a dot with a cast is the right
form. On a CPU it is the worst one (see `cpu_products`, which also says what serves one to eight rows). More
rows than that are bound by arithmetic: 16-bit activations and weights of one dtype go to a native dot, and
other pairs are cast in tiles that stay in cache, behind a fence that ties the cast to its loop. Against a
float32 dot of the same shape (576x1536): int8 tiles x0.8 at 16 rows and x1.02 at 256, where a cast of the
whole weight costs x4.2 and x1.4; native bfloat16 x0.6 and x0.5.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_products

_FEW_ROWS = 8
_TILE_BYTES = 1 << 19
_SMALL = 1 << 15


def quantized_matmul(
    x: jax.Array, w: jax.Array, scales: jax.Array | None = None, *, transpose: bool, out_dtype: jnp.dtype
) -> jax.Array:
    """`[..., K], [K, N] or [N, K], float32 [N] or None -> [..., N]` in `out_dtype`."""
    out = _jitted(x.reshape(-1, x.shape[-1]), w, scales, transpose)
    return out.astype(out_dtype).reshape(*x.shape[:-1], out.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, w, scales, transpose) -> jax.Array:
    out = _product(x, w, transpose)
    return out if scales is None else out * scales


def _matmul_fwd(x, w, scales, transpose):
    return _matmul(x, w, scales, transpose), (x, w, scales)


def _matmul_bwd(transpose, saved, dout):
    x, w, scales = saved
    # Gradients of a 16-bit product are dots of that dtype, as its forward dot is.
    weighted = (dout if scales is None else dout * scales).astype(x.dtype)
    dx = _product(weighted, w, not transpose).astype(x.dtype)
    dw = dscales = None
    if jnp.issubdtype(w.dtype, jnp.floating):
        left, right = (weighted, x) if transpose else (x, weighted)
        dw = _dot(left.T, right, transpose=False).astype(w.dtype)
    if scales is not None:
        dscales = jnp.sum(_product(x, w, transpose) * dout, axis=0)
    return dx, dw, dscales


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
# Jitted, so that the layers of a model share one trace.
_jitted = jax.jit(_matmul, static_argnums=3)


def _product(x, w, transpose):
    """float32 `x @ w` or `x @ w.T`."""
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[0 if transpose else 1]), jnp.float32)
    return jax.lax.platform_dependent(
        x, w, cpu=partial(_on_cpu, transpose=transpose), default=partial(_cast_dot, transpose=transpose)
    )


def _dot(x, w, *, transpose):
    precision = "highest" if x.dtype == jnp.float32 else None
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)


def _common_dtype(x, w):
    return x.dtype if w.dtype == jnp.int8 else jnp.promote_types(x.dtype, w.dtype)


def _cast_dot(x, w, *, transpose):
    dtype = _common_dtype(x, w)
    return _dot(x.astype(dtype), w.astype(dtype), transpose=transpose)


def _on_cpu(x, w, *, transpose):
    rows, inner = x.shape
    # There is no native dot of float16 here.
    native = x.dtype == w.dtype != jnp.float16
    few = 2 if native else _FEW_ROWS
    narrow = w.dtype != jnp.float32 and w.size > _SMALL
    if narrow and rows <= few and cpu_products.can_fuse(inner, transpose):
        stored = cpu_products.bits(w)
        return cpu_products.few_rows(x.astype(jnp.float32), stored, w.dtype, transposed=transpose)
    if native and rows == 1 and x.dtype == jnp.bfloat16:
        # A dot of one row is not native; of two it is.
        return _dot(jnp.pad(x, ((0, 1), (0, 0))), w, transpose=transpose)[:1]
    if native:
        return _dot(x, w, transpose=transpose)
    return _cast_in_tiles(x, w, transpose)


def _cast_in_tiles(x, w, transpose):
    dtype = jnp.dtype(jnp.float32) if x.dtype == jnp.float16 else _common_dtype(x, w)
    axis = 0 if transpose else 1
    columns, inner = w.shape[axis], w.shape[1 - axis]
    width = max(128, _TILE_BYTES // (inner * dtype.itemsize) // 128 * 128)
    x = x.astype(dtype)
    if columns <= width or w.dtype == dtype:
        return _dot(x, w.astype(dtype), transpose=transpose)

    def body(i, out):
        # Without the fence the cast of the whole weight is hoisted out of the loop.
        fenced, i = jax.lax.optimization_barrier((w, i))
        first = jnp.minimum(i * width, columns - width)
        tile = jax.lax.dynamic_slice_in_dim(cpu_products.bits(fenced), first, width, axis)
        tile = cpu_products.values(tile, w.dtype).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, _dot(x, tile, transpose=transpose), first, 1)

    out = jnp.zeros((x.shape[0], columns), jnp.float32)
    return jax.lax.fori_loop(0, -(-columns // width), body, out)
