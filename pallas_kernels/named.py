"""What a named case gives to the compile tests, the benchmarks and the tuner: a call, and the work in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """The least that a call must do: what a roofline is drawn from."""

    flops: float  # useful ones: masked scores and empty groups do not count
    bytes: float  # to and from HBM, each byte once: live cache, weights of groups that have rows, results
    dtype: str = "bfloat16"  # of the products: "bfloat16", "int8" or "float32"


@dataclass(frozen=True)
class Call:
    """`fn(*args)` calls the op. Large arrays among args are `jax.ShapeDtypeStruct`s; those whose values steer the
    kernel (lengths, page tables, group sizes) are NumPy arrays. `donate`: positions of args written in place."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    work: Work
    donate: tuple[int, ...] = ()
