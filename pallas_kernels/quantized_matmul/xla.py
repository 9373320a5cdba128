"""`quantized_matmul` in plain XLA.

On TPU and GPU the compiler reads a narrow weight as it is inside its matmul, so a dot with a cast is the right
form. On a CPU it is the worst one (see `cpu_products`, which also says what serves one to eight rows). More
rows than that are bound by arithmetic: 16-bit activations and weights of one dtype go to a native dot, and
other pairs are cast in tiles that stay in cache, behind a fence that ties the cast to its loop. Every product has
two tiles or more, and its result starts from zeros that wait for the activations: a cast without a loop, or
plain zeros, are all computed before the first product and kept, cold memory at each use. Time against float32
dots of the same shapes, 30 layers of a 134.5 M-parameter Llama one after another (jaxlib 0.10, x86-64, two
cores): int8 and bfloat16 x0.74 at 16 rows and x1.0 at 128 (x1.6 with casts and zeros kept), the head
(576x49152) x0.41 at 128; native bfloat16 x0.6 and x0.5.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_products
from pallas_kernels.stored import from_bits, to_bits

_FEW_ROWS = 8
_TILE_BYTES = 1 << 21
_SMALL = 1 << 15
_SELECTED = 16
"""Entries of a codebook up to which a value is found by selecting."""


def quantized_matmul(
    x: jax.Array,
    x_scale: jax.Array | None,
    w: jax.Array,
    scales: jax.Array | None,
    codebook: jax.Array | None = None,
    *,
    transpose: bool,
) -> jax.Array:
    """`[M, K]`, float32 `[M, 1]` for int8 x, `[K, N]` or `[N, K]`, float32 `[G, N]` or None, float32 `[entries]` or
    None; float32 `[M, N]`."""
    if codebook is not None or (scales is not None and scales.shape[0] > 1):
        assert scales is not None
        out = _product_by_group(x, w, scales, codebook, transpose)
    else:
        out = _product(x, _storable(w), transpose)
        out = out if scales is None else out * scales
    return out if x_scale is None else out * x_scale


def backward(
    x: jax.Array,
    x_scale: jax.Array | None,
    w: jax.Array,
    scales: jax.Array | None,
    codebook: jax.Array | None,
    dout: jax.Array,
    *,
    dtype: jnp.dtype,
    transpose: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of x (in `dtype`, as if it had not been rounded), of a w of 16 or 32 bits, and of the scales."""
    # Gradients of a 16-bit product are dots of that dtype, as its forward dot is.
    dscales = None
    if codebook is not None or (scales is not None and scales.shape[0] > 1):
        assert scales is not None
        wide = _widened(w, codebook)
        dx = _dot(dout.astype(dtype), _scaled(wide, scales, transpose).astype(dtype), transpose=not transpose)
        left = x.astype(jnp.float32) if x_scale is None else x * x_scale
        outer = _dot(left.T, dout, transpose=False) * (wide.T if transpose else wide)
        dscales = jnp.sum(outer.reshape(scales.shape[0], -1, outer.shape[1]), axis=1)
        return dx.astype(dtype), None, dscales
    stored, w = w, _storable(w)
    weighted = (dout if scales is None else dout * scales).astype(dtype)
    dx = _product(weighted, w, not transpose).astype(dtype)
    dw = None
    if stored.dtype.itemsize > 1 and jnp.issubdtype(stored.dtype, jnp.floating):
        left, right = (weighted, x) if transpose else (x, weighted)
        dw = _dot(left.T, right, transpose=False).astype(w.dtype)
    if scales is not None:
        product = _product(x, w, transpose)
        product = product if x_scale is None else product * x_scale
        dscales = jnp.sum(product * dout, axis=0, keepdims=True)
    return dx, dw, dscales


def _storable(w):
    """The weight in a dtype that XLA's CPU compiler slices, of the same values."""
    if w.dtype in (jnp.int4, jnp.int2):
        return w.astype(jnp.int8)
    return w.astype(jnp.bfloat16) if w.dtype.itemsize == 1 and jnp.issubdtype(w.dtype, jnp.floating) else w


def _widened(w, codebook):
    """float32: the values that the codes stand for."""
    if codebook is None:
        return w.astype(jnp.float32)
    codes = w.astype(jnp.int32)
    if codebook.shape[0] > _SELECTED:
        return jnp.take(codebook, codes, mode="clip")
    # A gather of single numbers is slow everywhere; this halves the book once a bit of the code.
    book, bit = [codebook[i] for i in range(codebook.shape[0])], 1
    while len(book) > 1:
        book = [jnp.where(codes & bit, book[min(i + 1, len(book) - 1)], book[i]) for i in range(0, len(book), 2)]
        bit *= 2
    return jnp.broadcast_to(book[0], w.shape)


def _scaled(wide, scales, transpose):
    """float32: widened values times the scales of their groups."""
    group = wide.shape[1 if transpose else 0] // scales.shape[0]
    return wide * (jnp.repeat(scales.T, group, axis=1) if transpose else jnp.repeat(scales, group, axis=0))


def _product_by_group(x, w, scales, codebook, transpose):
    """float32 `x @ w` with `w` scaled by groups of its contraction, and read in a codebook."""
    if 0 in (*x.shape, *w.shape):
        return _product(x, _storable(w), transpose)
    return jax.lax.platform_dependent(
        x,
        w,
        scales,
        codebook,
        cpu=partial(_by_group_in_tiles, transpose=transpose),
        default=partial(_by_group_dot, transpose=transpose),
    )


def _by_group_dot(x, w, scales, codebook, *, transpose):
    dtype = jnp.dtype(jnp.bfloat16) if x.dtype == jnp.int8 else x.dtype
    wide = _scaled(_widened(w, codebook), scales, transpose)
    return _dot(x.astype(dtype), wide.astype(dtype), transpose=transpose)


def _by_group_in_tiles(x, w, scales, codebook, *, transpose):
    axis = 0 if transpose else 1
    columns, inner = w.shape[axis], w.shape[1 - axis]
    width = _tile_width(columns, inner, 4)
    x = x.astype(jnp.float32)

    def body(i, out):
        # Without the fence the weight is dequantised whole, outside of the loop.
        (narrow, by_group), i = jax.lax.optimization_barrier(((w, scales), i))
        first = jnp.minimum(i * width, columns - width)
        tile = from_bits(jax.lax.dynamic_slice_in_dim(to_bits(narrow), first, width, axis), w.dtype)
        part = jax.lax.dynamic_slice_in_dim(by_group, first, width, 1)
        wide = _scaled(_widened(tile, codebook), part, transpose)
        return jax.lax.dynamic_update_slice_in_dim(out, _dot(x, wide, transpose=transpose), first, 1)

    return jax.lax.fori_loop(0, -(-columns // width), body, _zeros_after(x, columns))


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
    # Products of bytes are whole numbers, which float32 sums without error up to 2^24.
    if x.dtype == jnp.int8:
        return jnp.dtype(jnp.float32)
    return x.dtype if w.dtype == jnp.int8 else jnp.promote_types(x.dtype, w.dtype)


def _cast_dot(x, w, *, transpose):
    if x.dtype == w.dtype == jnp.int8:
        contract = (((1,), (1 if transpose else 0,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.int32).astype(jnp.float32)
    dtype = _common_dtype(x, w)
    return _dot(x.astype(dtype), w.astype(dtype), transpose=transpose)


def _on_cpu(x, w, *, transpose):
    rows, inner = x.shape
    # There is no native dot of float16 or of int8 here.
    native = x.dtype == w.dtype and x.dtype not in (jnp.float16, jnp.int8)
    if w.dtype == jnp.float32:
        few = range(2, 2 if transpose else 4)
    else:
        few = range(1, 3 if native else _FEW_ROWS + 1)
    if rows in few and w.size > _SMALL and cpu_products.can_fuse(inner, transpose):
        stored = to_bits(w)
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
    width = _tile_width(columns, inner, dtype.itemsize)
    x = x.astype(dtype)
    if columns == width or w.dtype == dtype:
        return _dot(x, w.astype(dtype), transpose=transpose)

    def body(i, out):
        # Without the fence the cast of the whole weight is hoisted out of the loop.
        fenced, i = jax.lax.optimization_barrier((w, i))
        first = jnp.minimum(i * width, columns - width)
        tile = jax.lax.dynamic_slice_in_dim(to_bits(fenced), first, width, axis)
        tile = from_bits(tile, w.dtype).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, _dot(x, tile, transpose=transpose), first, 1)

    return jax.lax.fori_loop(0, -(-columns // width), body, _zeros_after(x, columns))


def _tile_width(columns: int, inner: int, itemsize: int) -> int:
    """Columns of a tile: two tiles at least, of at most `_TILE_BYTES`; all of a small weight's."""
    tiles = max(2, -(-columns * inner * itemsize // _TILE_BYTES))
    return min(columns, max(128, -(-columns // tiles // 64) * 64))


def _zeros_after(x, columns):
    """Float32 zeros `[M, columns]`, of which the compiler only learns once `x` is there."""
    x = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x[0, 0], jnp.int32)
    zero = jax.lax.bitcast_convert_type(bits * bits & 2, jnp.float32)  # squares are 0 or 1 modulo 4
    return jnp.broadcast_to(zero, (x.shape[0], columns))
