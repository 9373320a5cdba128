"""How arrays lie in a device's memory."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding


def row_major(ndim: int, sharding: Sharding) -> Format:
    """Last axis fastest, whatever the device would choose.

    By itself a TPU lays arrays out for the least padding: a matrix [201088, 2880] becomes column-major, since 2880
    is no multiple of 128. Gathers of rows and kernels read rows, and a program would first copy the whole matrix.
    """
    return Format(Layout(tuple(range(ndim))), sharding)


def place(x: Any, device: Any = None) -> jax.Array:
    """An array on a device (default: the first), as weights should lie there.

    Elsewhere than on TPUs arrays are row-major anyway, and stay uncommitted unless a device is given.
    """
    target = jax.devices()[0] if device is None else device
    if target.platform == "tpu":
        return jax.device_put(x, row_major(x.ndim, SingleDeviceSharding(target)))
    return jax.device_put(x, device)
