"""Operands of kernels, followed through loops, branches and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec

from jaxinf.aot.static.values import kernels


def kernel(lengths: jax.Array, x: jax.Array) -> jax.Array:
    def body(lengths_ref, x_ref, o_ref):
        o_ref[...] = x_ref[...] * lengths_ref[0].astype(jnp.float32)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(1,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, lengths: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, lengths: (0, 0)),
    )
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, grid_spec=spec, out_shape=shape, name="named")(lengths, x)


X = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def known(fn, *given) -> list[list[int] | None]:
    """What is known of each kernel's first operand; arrays are given, shapes are not."""
    shapes = [jax.ShapeDtypeStruct(g.shape, g.dtype) for g in given]
    closed = jax.make_jaxpr(fn)(*shapes)
    values = [g if isinstance(g, np.ndarray) else None for g in given]
    found = kernels(closed, values)
    assert all(k.name == "named" for k in found)
    assert all(k.shapes[1] == "f32[8,128]" for k in found)
    return [None if k.values[0] is None else np.asarray(k.values[0]).tolist() for k in found]


LENGTHS = np.array([3, 4], np.int32)


def test_a_scan_is_followed_through_its_first_trip() -> None:
    def fn(lengths, x):
        def body(x, layer):
            return kernel(lengths + layer, x), None

        return jax.lax.scan(body, x, jnp.arange(10, 14, dtype=jnp.int32))[0]

    assert known(fn, LENGTHS, X) == [[13, 14]]


def test_a_while_loop_and_what_it_leaves_as_it_was() -> None:
    def fn(lengths, x):
        def body(carry):
            i, same, x = carry
            return i + 1, same, kernel(same + i, x)

        i, same, x = jax.lax.while_loop(lambda carry: carry[0] < 5, body, (jnp.int32(1), lengths, x))
        return kernel(same, x) + kernel(same + i, x)

    assert known(fn, LENGTHS, X) == [[4, 5], [3, 4], None]


def test_the_branch_of_the_platform() -> None:
    def fn(lengths, x):
        return jax.lax.platform_dependent(
            lengths, x, tpu=kernel, default=lambda lengths, x: kernel(lengths * 100, x)
        )

    assert known(fn, LENGTHS, X) == [[3, 4]]


def test_inside_of_a_shard_map_the_first_chip_sees_its_part() -> None:
    mesh = AbstractMesh((2,), ("tensor",))

    def local(lengths, x):
        total = jax.lax.psum(lengths, "tensor") + jax.lax.axis_index("tensor")
        both = jax.lax.all_gather(lengths, "tensor", tiled=True)
        return kernel(total, x) + kernel(both, x)

    def fn(lengths, x):
        rows = PartitionSpec("tensor")
        return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)(lengths, x)

    wide = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    assert known(fn, LENGTHS, wide) == [[6], [3, 3]]


def test_unknown_scores_spread_tokens_over_all_experts() -> None:
    def fn(scores, x):
        _, chosen = jax.lax.top_k(scores, 2)
        return kernel(jnp.bincount(chosen.reshape(-1), length=4).astype(jnp.int32), x)

    assert known(fn, jax.ShapeDtypeStruct((6, 4), jnp.float32), X) == [[3, 3, 3, 3]]


def test_known_keys_are_sorted_beside_what_is_unknown() -> None:
    def fn(keys, weights, x):
        sorted_keys, places, _ = jax.lax.sort((keys, jnp.arange(4, dtype=jnp.int32), weights), num_keys=1)
        return kernel(sorted_keys, x) + kernel(places, x)

    keys = np.array([2, 0, 1, 0], np.int32)
    assert known(fn, keys, jax.ShapeDtypeStruct((4,), jnp.float32), X) == [[0, 0, 1, 2], [1, 3, 2, 0]]


def test_what_depends_on_unknown_data_is_unknown() -> None:
    def fn(lengths, x):
        return kernel(lengths + jnp.argmax(x).astype(jnp.int32), x)

    assert known(fn, LENGTHS, X) == [None]
