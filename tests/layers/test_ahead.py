"""Weights that travel while chips add: the same numbers on emulated chips, and the order in compiled programs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import mesh, over
from tpu_compiler import needs_compiler

from jaxinf import LM, compression
from jaxinf.aot import Job, programs, run
from jaxinf.core import to_record
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, ahead
from jaxinf.layers.ahead import Unsummed
from jaxinf.models import CausalLM, ModelSpec, fold, presets
from pallas_kernels import chips
from pallas_kernels.streamed_matmul import kernel

PROMPTS = [[1, 2, 3, 4, 5], [7]]


def model(ffn=None, scheme: str | None = "int8", **layer) -> CausalLM:
    """Two chips have whole tiles of each weight: 128 channels and more."""
    one = LayerSpec(AttentionSpec(2, 2, 128, rope=RopeSpec(128), qkv_bias=True), ffn or FFNSpec(512), **layer)
    made = CausalLM(ModelSpec(64, 256, fold([one] * 2), 64), rngs=nnx.Rngs(0), layout="stacked")
    graph, state = nnx.split(made)
    wide = nnx.merge(graph, jax.tree.map(lambda x: 2 * x + 0.01 * (x.ndim < 3), state))
    return compression.quantize(wide, scheme) if scheme else wide


def tokens(lm: LM) -> list:
    jax.clear_caches()
    return [answer.tokens for answer in lm.generate(PROMPTS, max_new_tokens=4, temperature=0.0, eos=())]


@pytest.fixture
def counts(monkeypatch) -> list:
    """What is fetched, from now on on a CPU too: a tuple a call, of how many tiles of each weight."""
    found, plain = [], kernel.fetch

    def noting(weights, layer, after, tiles, **options):
        found.append(tiles.counts)
        return plain(weights, layer, after, tiles, **options)

    monkeypatch.setattr(kernel, "fetch", noting)
    monkeypatch.setattr(ahead, "_IMPLEMENTATION", "interpret")
    return found


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(model()).shard("data=4,tensor=2")


@pytest.fixture(scope="module")
def plain(lm) -> list:
    """Tokens where each sum stands beside its product."""
    return tokens(lm)


def test_tokens_stay_the_same(lm, plain, counts) -> None:
    assert tokens(lm) == plain
    # Queries, keys and values; the product after attention; gate and up. Of the last product's one tile, no part.
    assert counts[:3] == [(1, 1, 1), (1,), (1, 1)]


def test_where_little_has_room_the_rest_is_read_as_ever(lm, plain, counts, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "_meanwhile", lambda part: 256 * 128)  # a tile of queries, none of gate and up
    assert tokens(lm) == plain
    assert counts[0] == (1, 0, 0)
    assert all(len(tiles) != 2 for tiles in counts)


@pytest.mark.parametrize(
    ("made", "leaves"),
    [
        (model, True),
        (lambda: model(scheme=None), False),
        (lambda: model(scheme="int4"), False),
        (lambda: model(placement="post"), False),
        (lambda: model(residual_scale=0.5), False),
        (lambda: model(FFNSpec(512, bias=True)), False),
        (lambda: model(MoESpec(2, 128)), False),
    ],
    ids=["int8", "wide", "int4", "norms-after", "scaled", "bias", "mixture"],
)
def test_which_layers_leave_their_sums(made, leaves, counts) -> None:
    (block,) = made().segments[0].blocks
    assert not block.leaves_sums(8)  # one chip
    found = []
    where = mesh(tensor=2)
    over(where, lambda x: (found.append((block.leaves_sums(8), block.leaves_sums(10_000))), x)[1], P(), P())(
        jnp.zeros(1)
    )
    assert found == [(leaves, False)]


def test_nothing_is_left_where_nothing_is_fetched() -> None:
    (block,) = model().segments[0].blocks
    found = []
    over(mesh(tensor=2), lambda x: (found.append(block.leaves_sums(8)), x)[1], P(), P())(jnp.zeros(1))
    assert found == [False]  # a CPU


def test_a_stream_settles_to_its_sum() -> None:
    x, part = np.arange(6.0).reshape(1, 2, 3), np.arange(12.0).reshape(2, 2, 3)

    def settled(x, part):
        return Unsummed(x, part).settle()[0], Unsummed.of(x).settle()[0]

    both, alone = over(mesh(tensor=2), settled, (P(), P("tensor")), P())(x, part)
    np.testing.assert_array_equal(both, x + part.sum(0))
    np.testing.assert_array_equal(alone, x)


def shallow(name: str, layers: int) -> ModelSpec:
    """A published model's widths, with few layers and a small vocabulary."""
    spec = presets.preset(name)
    (segment,) = spec.segments
    return dataclasses.replace(spec, vocab=2048, segments=(dataclasses.replace(segment, repeats=layers),))


DECODE = [("v5e:4x4", 16, 8), ("v6e:2x4", 8, 16)]


@needs_compiler
@pytest.mark.parametrize(("chip", "size", "batch"), DECODE, ids=[c.partition(":")[0] for c, _, _ in DECODE])
def test_copies_begin_before_a_sum_and_their_buffers_are_not_moved(chip, size, batch) -> None:
    made = programs.generation(
        shallow("llama-3.1-70b", 2),
        chip=chip,
        mesh=f"tensor={size}",
        part="decode",
        batch=batch,
        capacity=2048,
        quantize="int8",
    )
    text = made.compiled.text
    (body,) = (part for part in re.split(r"\n(?=\S)", text) if "%fetch" in part)
    order = re.findall(r"%(fetch|psum|streamed_matmul|quantized_matmul)\.\d+ = ", body)
    assert order.index("fetch") < order.index("psum") < order.index("streamed_matmul")
    assert order.count("psum") == 2
    parts = dict(re.findall(r"%([\w.\-]+) = .*? get-tuple-element\(%([\w.\-]+)\)", body))
    uses = re.findall(r"%streamed_matmul\.\d+ = .*? custom-call\((.*?)\), custom_call_target", body)
    given = [parts.get(name, "") for use in uses for name in re.findall(r"%([\w.\-]+)", use)]
    fetches = {name for name in given if name.startswith("fetch")}
    assert len(fetches) == order.count("fetch") == len(uses)


@needs_compiler
def test_the_static_model_sees_sums_hidden() -> None:
    spec = to_record(shallow("llama-3.1-70b", 8))
    arguments = dict(
        spec=spec, chip="v5e:4x4", mesh=dict(tensor=16), part="decode", batch=8, capacity=2048, held=2047
    )
    job = Job("jaxinf.aot.plan.compiling:program", arguments | dict(quantize="int8"), "program")
    (outcome,) = run([job], "v5e:4x4")
    line = outcome.result().timeline
    assert line is not None
    assert line.unknown == ()
    assert line.hbm_seconds < line.seconds < line.hbm_seconds + line.ici_seconds


def test_bytes_that_arrive_during_a_sum() -> None:
    """12 hops of a microsecond on 4x4 chips of a v5e; a large sum by its bytes."""
    found = []

    def inside(x):
        found.append((ahead._meanwhile(x), ahead._meanwhile(jnp.zeros((1 << 20,), jnp.bfloat16))))
        return x

    over(mesh(tensor=4), inside, P(), P())(jnp.zeros((8, 16)))
    few, many = found[0]
    assert few == pytest.approx(4e-6 * chips.CHIPS["v5e"].bandwidth)
    assert many == 16 * 2 * (1 << 20)
