"""The formats of quantised matrices, each by rounding to the nearest.

    int8             w = s q      one scale a column, or a group of its rows
    int4             w = s q      one for 128, 64 or 32 rows
    fp8_e4m3, _e5m2  w = s q      one a column; q: 8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433)
    mxfp4            w = 2^e c[q] one exponent for 32 rows; c: 4-bit floats (OCP Microscaling Formats 1.0)
    nf4              w = s c[q]   one scale for 64 rows; c: quantiles of a normal distribution (Dettmers et al.
                                  2023, arXiv:2305.14314, appendix E)
    ternary          w = s q      q in -1, 0, 1; s = mean |w| of the matrix (Ma et al. 2024, arXiv:2402.17764)
    kmeans4, _8      w = c[q]     16 or 256 means of the matrix's entries (Han et al. 2015, arXiv:1510.00149)

Whole numbers reach one further down than up. Of int8 the scale is that of 127.5 steps to the largest entry, so
that none is off by more than half a step. Of int4 it is the one of a few with the least squared error in its group,
of the sign that puts the largest entry at -8: clipping some entries a little serves the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.quant.qtensor import QTensor
from pallas_kernels.errors import InputError

NF4: np.ndarray = np.asarray(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""QLoRA's code values; code i stands for entry i, as in bitsandbytes."""
E2M1: np.ndarray = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The 4-bit floats: code i has bits sign, exponent (2), mantissa (1)."""
REACHES: np.ndarray = np.asarray([16 / 15, 1, 0.96, 0.92, 0.88, 0.84, 0.8], np.float32)
"""Parts of the largest entry of a group that code -8 may stand for; with the first none is off by more than half a
step."""
_KMEANS_STEPS = 25


@dataclass(frozen=True)
class Format:
    """How a matrix is rounded to the nearest.

    groups: sizes of group to choose from, the first that divides K is taken; (): a whole column (or matrix).
    encode: float32 `[..., K, N]` and a group's rows -> `QTensor`; every leading entry by itself.
    """

    name: str
    encode: Callable[[jax.Array, int], QTensor]
    groups: tuple[int, ...] = ()
    grouped: bool = True

    def group(self, inner: int, asked: int | None = None) -> int:
        """Rows of a group of a matrix with `inner` rows.

        Raises:
          InputError: the group asked for does not divide, or none that the format has does.
        """
        if asked is None:
            fits = [g for g in self.groups if inner % g == 0] or ([] if self.groups else [inner])
            if not fits:
                some = ", ".join(str(g) for g in divisors(inner) if g >= 8) or "none"
                raise InputError(
                    f"{self.name} has groups of {', '.join(map(str, self.groups))} rows, none of which divides "
                    f"{inner}; give group= one of {some}"
                )
            return fits[0]
        if not self.grouped and asked != inner:
            raise InputError(f"{self.name} has no groups, so group={asked} cannot be given")
        if asked < 1 or inner % asked:
            raise InputError(
                f"group={asked} does not divide the {inner} input channels; these do: "
                f"{', '.join(map(str, divisors(inner)))}"
            )
        return asked

    def __call__(self, w: jax.Array, group: int | None = None) -> QTensor:
        """`[..., K, N]` of any float dtype -> `QTensor`."""
        return self.encode(w.astype(jnp.float32), self.group(w.shape[-2], group))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def format_of(name: str) -> Format:
    """
    Raises:
      InputError: an unknown name; lists those that there are.
    """
    if name not in FORMATS:
        raise InputError(f"format {name!r} must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


def round_to_nearest(w: jax.Array, name: str = "int8", group: int | None = None) -> QTensor:
    """A matrix `[..., K, N]` in a format of `FORMATS`."""
    return format_of(name)(w, group)


def split(w: jax.Array, group: int) -> jax.Array:
    """`[..., K, N]` -> `[..., G, group, N]`."""
    *lead, inner, columns = w.shape
    return w.reshape(*lead, inner // group, group, columns)


def joined(grouped: jax.Array) -> jax.Array:
    """The reverse of `split`."""
    *lead, groups, group, columns = grouped.shape
    return grouped.reshape(*lead, groups * group, columns)


def _tidy(scales: jax.Array) -> jax.Array:
    """`[..., G, N]`, or `[..., N]` where there is one group."""
    return scales[..., 0, :] if scales.shape[-2] == 1 else scales


def inverse(scales: jax.Array) -> jax.Array:
    """1 / scales, and 0 where a group is all zeros (or so small that its scale vanished)."""
    return jnp.where(scales == 0, 0, 1 / jnp.where(scales == 0, 1, scales))


def whole_number_scales(grouped: jax.Array, bits: int) -> jax.Array:
    """Scales `[..., G, N]` of entries `[..., G, group, N]` as whole numbers of so many bits."""
    low = -(2 ** (bits - 1))
    if bits > 4:
        return jnp.max(jnp.abs(grouped), axis=-2) / (-low - 0.5)
    at = jnp.argmax(jnp.abs(grouped), axis=-2, keepdims=True)
    largest = jnp.take_along_axis(grouped, at, axis=-2)

    relative = grouped * inverse(largest)

    def error(part: jax.Array) -> jax.Array:
        scale = part / low
        return jnp.sum((to_whole(relative, scale, bits) * scale - relative) ** 2, axis=-2)

    best = jnp.argmin(jax.lax.map(error, jnp.asarray(REACHES)), axis=0)
    return jnp.squeeze(largest, -2) * jnp.asarray(REACHES)[best] / low


def to_whole(grouped: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """float32 whole numbers of so many bits, the nearest to `grouped / scale`."""
    return jnp.clip(jnp.round(grouped * inverse(scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _whole(bits: int, dtype) -> Callable[[jax.Array, int], QTensor]:
    def encode(w: jax.Array, group: int) -> QTensor:
        grouped = split(w, group)
        scales = whole_number_scales(grouped, bits)
        values = joined(to_whole(grouped, scales[..., None, :], bits))
        return QTensor(values.astype(dtype), _tidy(scales))

    return encode


def _float8(dtype) -> Callable[[jax.Array, int], QTensor]:
    most = float(jnp.finfo(dtype).max)

    def encode(w: jax.Array, group: int) -> QTensor:
        grouped = split(w, group)
        scales = jnp.max(jnp.abs(grouped), axis=-2) / most
        values = jnp.clip(grouped * inverse(scales)[..., None, :], -most, most)
        return QTensor(joined(values).astype(dtype), _tidy(scales))

    return encode


def _nearest(x: jax.Array, table: np.ndarray, order: np.ndarray) -> jax.Array:
    """Codes of the entries of `table` nearest to x; `order` sorts it."""
    rising = table[order]
    between = jnp.asarray((rising[1:] + rising[:-1]) / 2)
    return jnp.asarray(order, jnp.int32)[jnp.searchsorted(between, x)]


def _mxfp4(w: jax.Array, group: int) -> QTensor:
    grouped = split(w, group)
    largest = jnp.max(jnp.abs(grouped), axis=-2)
    # The exponent of the largest entry, less that of the largest 4-bit float (4 = 2^2).
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1 - 2, -126, 127)
    scales = jnp.where(largest == 0, 1.0, jnp.ldexp(jnp.float32(1), exponent))
    order = np.asarray([code for code in np.argsort(E2M1) if code != 8])  # without the second zero
    codes = joined(_nearest(grouped / scales[..., None, :], E2M1, order))
    book = jnp.broadcast_to(jnp.asarray(E2M1), (*w.shape[:-2], 16))
    return QTensor(codes.astype(jnp.uint4), _tidy(scales).astype(jnp.float8_e8m0fnu), codebook=book)


def _nf4(w: jax.Array, group: int) -> QTensor:
    grouped = split(w, group)
    scales = jnp.max(jnp.abs(grouped), axis=-2)
    codes = joined(_nearest(grouped * inverse(scales)[..., None, :], NF4, np.arange(16)))
    book = jnp.broadcast_to(jnp.asarray(NF4), (*w.shape[:-2], 16))
    return QTensor(codes.astype(jnp.uint4), _tidy(scales), codebook=book)


def _ternary(w: jax.Array, group: int) -> QTensor:
    scale = jnp.mean(jnp.abs(w), axis=(-2, -1), keepdims=True)
    values = jnp.clip(jnp.round(w * inverse(scale)), -1, 1)
    return QTensor(values.astype(jnp.int2), jnp.broadcast_to(scale[..., 0, :], (*w.shape[:-2], w.shape[-1])))


def _kmeans(bits: int, dtype) -> Callable[[jax.Array, int], QTensor]:
    entries = 2**bits

    def one(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lloyd's steps from means spread evenly over the range: large entries keep one (section 3.2 there)."""
        flat = w.reshape(-1)

        def assign(means):
            return jnp.searchsorted((means[1:] + means[:-1]) / 2, flat)

        def step(_, means):
            codes = assign(means)
            count = jnp.zeros(entries).at[codes].add(1.0)
            total = jnp.zeros(entries).at[codes].add(flat)
            return jnp.sort(jnp.where(count > 0, total / jnp.maximum(count, 1), means))

        means = jax.lax.fori_loop(0, _KMEANS_STEPS, step, jnp.linspace(flat.min(), flat.max(), entries))
        return assign(means).reshape(w.shape), means

    def encode(w: jax.Array, group: int) -> QTensor:
        codes, book = jax.lax.map(one, w.reshape(-1, *w.shape[-2:]))
        scales = jnp.ones((*w.shape[:-2], w.shape[-1]))
        return QTensor(codes.astype(dtype).reshape(w.shape), scales, codebook=book.reshape(*w.shape[:-2], entries))

    return encode


FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        Format("int8", _whole(8, jnp.int8)),
        Format("int4", _whole(4, jnp.int4), (128, 64, 32)),
        Format("fp8_e4m3", _float8(jnp.float8_e4m3fn)),
        Format("fp8_e5m2", _float8(jnp.float8_e5m2)),
        Format("mxfp4", _mxfp4, (32,)),
        Format("nf4", _nf4, (64,)),
        Format("ternary", _ternary, grouped=False),
        Format("kmeans4", _kmeans(4, jnp.uint4), grouped=False),
        Format("kmeans8", _kmeans(8, jnp.uint8), grouped=False),
    )
}
"""By name."""
