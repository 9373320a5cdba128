"""The all-to-all form, the choice between it and the ring, and merging over chips."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh, over
from split_attention import EVERYTHING, TOKENS, compare

from pallas_kernels import flash_attention
from pallas_kernels.errors import InputError
from sharding.sequence import add_sinks, choose, merge_chips, sequence_attention
from sharding.ulysses import ulysses_attention


@pytest.mark.parametrize(("chips", "heads", "kv_heads"), [(2, 4, 2), (4, 4, 2), (8, 8, 1)])
def test_ulysses(chips: int, heads: int, kv_heads: int) -> None:
    sizes = dict(heads=heads, kv_heads=kv_heads)
    compare(ulysses_attention, 64, chips, **sizes)
    compare(ulysses_attention, 37, chips, **sizes, window=9, **EVERYTHING)
    compare(ulysses_attention, 64, chips, **sizes, lengths=np.array([50, 3], np.int32), **EVERYTHING)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (6, 6, r"6 query heads do not divide over 4 chips \(1, 2, 3, 6 would\)"),
        (12, 6, "6 key heads neither divide"),
    ],
)
def test_ulysses_refuses_what_it_cannot_split(heads: int, kv_heads: int, message: str) -> None:
    q, k = jnp.zeros((1, heads, 8, 8)), jnp.zeros((1, kv_heads, 8, 8))
    with pytest.raises(InputError, match=message):
        over(mesh(sequence=4), ulysses_attention, (TOKENS,) * 3, TOKENS)(q, k, k)


def test_the_form_is_chosen_by_what_is_exposed() -> None:
    llama = dict(heads=32, kv_heads=8, head_dim=128, itemsize=2, chips=8)
    assert choose(tokens=16384, **llama) == "ring"  # products hide the transfers
    assert choose(tokens=256, **llama) == "ulysses"
    assert choose(tokens=256, window=64, **llama) == "ring"  # neighbours alone
    assert choose(tokens=256, **(llama | dict(heads=30, kv_heads=6))) == "ring"  # heads do not divide
    assert choose(tokens=256, **(llama | dict(chips=1))) == "ring"


def test_both_forms_agree_with_one_chip() -> None:
    for form in ("ring", "ulysses", None):
        compare(partial(sequence_attention, form=form), 32, 2, window=20)
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 8)).astype(np.float32)
    got = over(mesh(), lambda x: sequence_attention(x, x, x), (P(),), P())(x)
    np.testing.assert_allclose(got, flash_attention(x, x, x), atol=1e-6)


def test_merging_across_chips() -> None:
    draw = np.random.default_rng(2).normal
    q = draw(size=(1, 2, 3, 8)).astype(np.float32)
    k, v = (draw(size=(1, 2, 16, 8)).astype(np.float32) for _ in range(2))
    sinks = jnp.array([0.3, -2.0])
    lengths = np.array([9], np.int32)  # chip 3 of four has no key

    def run(q, k, v):
        own = jnp.clip(lengths - 4 * jax.lax.axis_index("sequence"), 0, 4)
        out, lse = flash_attention(q, k, v, causal=False, lengths=own, return_lse=True)
        out, lse = merge_chips(out, lse, "sequence")
        return out, lse, add_sinks(out, lse, sinks)

    out, lse, sunk = over(mesh(sequence=4), run, (P(), TOKENS, TOKENS), P())(q, k, v)
    options = dict(causal=False, lengths=lengths, implementation="reference")
    want, want_lse = flash_attention(q, k, v, return_lse=True, **options)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)
    np.testing.assert_allclose(sunk, flash_attention(q, k, v, sinks=sinks, **options), atol=1e-6)
