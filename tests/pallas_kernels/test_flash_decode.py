"""The contract of `flash_decode`: every implementation against the rules."""

import functools
import math

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import flash_decode
from pallas_kernels.chips import CHIPS
from pallas_kernels.errors import InputError, UnsupportedError
from pallas_kernels.flash_decode import Blocks
from pallas_kernels.flash_decode import blocks as sizes
from pallas_kernels.flash_decode.cases import MODELS, SMALL
from pallas_kernels.stored import to_bits
from pallas_kernels.tuned import budget

CASES = {case.name: case for case in SMALL}
VARIANTS = [
    (case, implementation, blocks)
    for case in SMALL
    for implementation, blocks in (
        ("reference", None),
        ("xla", None),
        ("xla", Blocks(5)),
        ("interpret", None),
        ("interpret", Blocks(128, depth=2, rows=math.gcd(case.batch, 2), splits=2)),
    )
    if implementation != "interpret" or blocks is None or case.slots > 128
]


def stored(x, dtype):
    """float values, nan among them, as a cache of `dtype`; an int8 cache has no nan."""
    if dtype == "int8":
        return jnp.asarray(np.nan_to_num(x, nan=127), dtype)
    return to_bits(jnp.asarray(x, jnp.bfloat16)) if dtype == "uint16" else jnp.asarray(x, dtype)


def rounded(x, dtype):
    """x with the values that a cache of `dtype` can hold."""
    return np.asarray(jnp.asarray(x, "bfloat16" if dtype == "uint16" else dtype), np.float32)


@functools.cache
def expected(name):
    """Arguments with nan in all that nothing may read, and the oracle's answer for the last layer."""
    case = CASES[name]
    (q, k, v), options = case.inputs()
    q, k, v = rounded(q, case.dtype), rounded(k, case.cache), rounded(v, case.cache)
    layer = None if case.layers is None else case.layers - 1
    lengths = np.array(case.lengths)

    def one(x):
        return x if layer is None else x[layer]

    scales = {name: one(options[name]) for name in ("k_scale", "v_scale") if name in options}
    out, lse, seen = oracle.decode(q, one(k), one(v), lengths, **(options | scales))
    used = oracle.used_keys(seen, case.kv_heads)
    if layer is not None:
        used = np.stack([used if i == layer else np.zeros_like(used) for i in range(case.layers)])
    for name in scales:
        options[name] = np.where(used, options[name], np.nan).astype(np.float32)
    q = oracle.poisoned(q, seen.any(-1))
    k, v = (stored(oracle.poisoned(x, used), case.cache) for x in (k, v))
    return (jnp.asarray(q, case.dtype), k, v, lengths), layer, options, out, lse


def close(given, wanted, tolerance):
    given, wanted = np.asarray(given, np.float64), np.asarray(wanted)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(given[~finite], wanted[~finite])
    np.testing.assert_allclose(given[finite], wanted[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("case", "implementation", "blocks"),
    VARIANTS,
    ids=[f"{case.name}-{implementation}{'-small' if blocks else ''}" for case, implementation, blocks in VARIANTS],
)
def test_contract(case, implementation, blocks):
    arguments, layer, options, want_out, want_lse = expected(case.name)
    arrays = {key: x for key, x in options.items() if isinstance(x, np.ndarray)}
    static = {key: x for key, x in options.items() if key not in arrays}

    @jax.jit
    def run(arguments, layer, arrays):
        return flash_decode(
            *arguments,
            layer=layer,
            **static,
            **arrays,
            return_lse=True,
            implementation=implementation,
            blocks=blocks,
        )

    out, lse = run(arguments, layer, arrays)
    assert out.dtype == case.dtype
    assert lse.dtype == jnp.float32
    close(out, want_out, 1e-2 if case.dtype == "bfloat16" else 3e-6)
    close(lse, want_lse, 3e-6)


@functools.cache
def ragged(ring, implementation):
    blocks = {"xla": Blocks(3), "interpret": Blocks(128, rows=3)}[implementation]
    return jax.jit(
        functools.partial(
            flash_decode, window=7, ring=ring, blocks=blocks, return_lse=True, implementation=implementation
        )
    )


@given(st.booleans(), st.lists(st.integers(0, 40), min_size=3, max_size=3), st.integers(0, 99))
def test_any_lengths(ring, lengths, seed):
    check_lengths("xla", ring, lengths, seed)


@settings(max_examples=8)
@given(st.booleans(), st.lists(st.integers(0, 40), min_size=3, max_size=3), st.integers(0, 99))
def test_any_lengths_in_the_kernel(ring, lengths, seed):
    check_lengths("interpret", ring, lengths, seed)


def check_lengths(implementation, ring, lengths, seed):
    random = np.random.default_rng(seed)
    lengths = np.array(lengths if ring else [min(n, 13) for n in lengths])
    q, k, v = (random.normal(size=(3, n, t, 8)).astype(np.float32) for n, t in ((4, 2), (2, 11), (2, 11)))
    want_out, want_lse, seen = oracle.decode(q, k, v, lengths, ring=ring, window=7)
    used = oracle.used_keys(seen, 2)
    out, lse = ragged(ring, implementation)(q, oracle.poisoned(k, used), oracle.poisoned(v, used), lengths)
    close(out, want_out, 3e-6)
    close(lse, want_lse, 3e-6)


def test_values_may_be_the_keys():
    """Latent attention: the same answer as with the values given apart, the latent read once."""
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 4, 2, 24), (2, 1, 140, 24)))
    lengths = np.array([140, 3])
    want = flash_decode(q, k, k + 0, lengths, implementation="reference")
    for implementation in ("reference", "xla", "interpret"):
        got = flash_decode(q, k, k, lengths, blocks=Blocks(128), implementation=implementation)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_kernel_says_what_it_cannot_do():
    q, cache = jnp.zeros((3, 2, 1, 8)), jnp.zeros((3, 1, 9, 8), jnp.float16)
    call = functools.partial(flash_decode, q, cache, cache, np.array([9, 9, 9]), blocks=Blocks(100, rows=2))
    with pytest.raises(UnsupportedError, match=r"float16.*kv=100.*rows=2"):
        call(implementation="pallas")
    assert call().shape == q.shape


def test_blocks_that_do_not_fit_are_refused():
    q, cache = jnp.zeros((1, 8, 1, 128)), jnp.zeros((1, 8, 16384, 128))
    with pytest.raises(InputError, match=r"MiB of VMEM in flash_decode"):
        flash_decode(q, cache, cache, np.array([9]), blocks=Blocks(16384), implementation="interpret")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_sizes_chosen_for_named_cases_fit(chip):
    for case in MODELS:
        arrays = dict(zip(("q", "k", "v"), case.shapes, strict=True))
        window = case.options.get("window")
        problem = sizes.Problem(
            case.batch,
            case.kv_heads,
            case.heads // case.kv_heads * case.queries,
            case.queries,
            case.slots,
            case.head_dim,
            arrays["v"][-1],
            case.dtype,
            case.cache,
            left=None if window is None else window - 1,
            ring=case.options.get("ring", False),
        )
        chosen = sizes.heuristic(problem, chip)
        assert sizes.vmem_bytes(problem, chosen) <= budget(chip) // 2
        assert case.batch % chosen.rows == 0
        assert chosen.kv % 128 == 0


def test_layer_under_transforms():
    """The layer may be traced by scan and mapped by vmap."""
    random = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 2, 1, 8), *[(3, 2, 1, 9, 8)] * 2)
    )
    lengths = jnp.array([9, 4])

    @jax.jit
    def one(layer):
        return flash_decode(q, k, v, lengths, layer=layer, blocks=Blocks(4))

    alone = jnp.stack([one(layer) for layer in range(3)])
    np.testing.assert_allclose(jax.vmap(one)(jnp.arange(3)), alone, atol=1e-6)
    scanned = jax.lax.scan(lambda _, layer: (None, one(layer)), None, jnp.arange(3))[1]
    np.testing.assert_allclose(scanned, alone, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in MODELS if case.batch == 32], ids=lambda case: case.name)
def test_named_cases_are_calls(case):
    call = case.call(implementation=None)
    out = jax.eval_shape(call.fn, *call.args)
    assert out.shape == (*case.shapes[0][:3], case.head_dim if case.shared else case.value_dim)
    assert call.work.flops > 0
    assert call.work.bytes > 0
