"""Mixtures of experts on a mesh against the same mixture on one device."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import needs_compiler

from jaxinf.aot import lower, topology
from jaxinf.layers import ClampedGated, ExpertChoice, FFNSpec, MoESpec, Plain, TokenChoice
from jaxinf.layers.moe import MoE
from jaxinf.quant import parts, round_to_nearest
from sharding import experts, meshes, rules, zigzag

D, B, T = 16, 8, 4
MESHES = ("expert=8", "expert=4,tensor=2", "data=2,expert=2,tensor=2", "tensor=8")

SPECS = {
    "renormalised": MoESpec(16, 16, TokenChoice(top_k=3)),
    "plain": MoESpec(8, 16, TokenChoice(top_k=2, normalise=False)),
    "one": MoESpec(8, 16, TokenChoice(top_k=1), activation=Plain("relu")),
    "all": MoESpec(8, 16, TokenChoice(top_k=8)),
    "sigmoid with bias": MoESpec(16, 16, TokenChoice(top_k=2, score="sigmoid", selection_bias=True, scale=2.5)),
    "clamped": MoESpec(8, 16, TokenChoice(top_k=4, bias=True), activation=ClampedGated(limit=0.5), bias=True),
    "gated shared": MoESpec(8, 16, TokenChoice(top_k=2), shared=FFNSpec(16, bias=True), shared_gate=True),
    "choice of the batch": MoESpec(8, 16, ExpertChoice(), bias=True),
    "choice of a step": MoESpec(8, 16, ExpertChoice(among="step", capacity_factor=3.0), bias=True),
}


def build(spec: MoESpec, dtype=jnp.float32) -> MoE:
    layer = spec.build(D, rngs=nnx.Rngs(0), dtype=dtype)
    keys = iter(jax.random.split(jax.random.key(1), 32))
    for path, value in nnx.iter_graph(layer):
        if isinstance(value, nnx.Param) and path[-1].endswith("bias"):
            value[...] = (0.3 * jax.random.normal(next(keys), value.shape)).astype(value.dtype)
    return layer


def inputs(rows: int = B, columns: int = T) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (rows, columns, D))


def make_mesh(text: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return meshes.make(text)


def sharded(layer: MoE, mesh: str, *, cached: bool = False, sequence: bool = False):
    """`layer` as a function of the whole `x`, computed on a mesh of emulated devices."""
    made = make_mesh(mesh)
    graph, state = nnx.split(layer)
    leaves, tree = jax.tree.flatten(state)
    variables = [v for _, v in nnx.to_flat_state(state)]
    axes = [a for v in variables for *_, a in parts(v.get_value(), v.get_metadata()["logical_axes"])]
    assert len(axes) == len(leaves)
    tokens = PartitionSpec(("data", "expert"), "sequence" if sequence else None)

    def local(leaves, x):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x, cached=cached)

    program = jax.jit(
        jax.shard_map(
            local,
            mesh=made,
            in_specs=([rules.spec(a) for a in axes], tokens),
            out_specs=(tokens, PartitionSpec()),
            check_vma=False,
        )
    )
    return lambda x: program(leaves, x)


@pytest.fixture(params=["gathered", "exchanged", "in windows"])
def form(request, monkeypatch):
    """How rows reach their experts; a window of one token's experts takes the most rounds."""
    monkeypatch.setattr(experts, "PLAN_BYTES", 1e12 if request.param == "gathered" else -1e12)
    if request.param == "in windows":
        monkeypatch.setattr(experts, "WINDOW", 0.25)
        monkeypatch.setattr(experts, "LEAST_WINDOW", 1)
    return request.param


def check(layer: MoE, mesh: str, x: jax.Array, **options) -> None:
    want, loss = layer(x, cached=options.get("cached", False))
    got, sharded_loss = sharded(layer, mesh, **options)(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(sharded_loss, loss, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES[:3])
@pytest.mark.parametrize("name", ["renormalised", "clamped"])
def test_token_choice_in_every_form(name: str, mesh: str, form: str) -> None:
    check(build(SPECS[name]), mesh, inputs())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", SPECS)
def test_like_one_device(name: str, mesh: str) -> None:
    check(build(SPECS[name]), mesh, inputs())


@pytest.mark.parametrize("name", ["renormalised", "choice of the batch", "choice of a step"])
def test_tokens_split_over_sequence_too(name: str, monkeypatch) -> None:
    layer, x = build(SPECS[name]), inputs(rows=4, columns=8)
    want, loss = layer(x)
    got, sharded_loss = sharded(layer, "sequence=2,expert=2,tensor=2", sequence=True)(zigzag.to_zigzag(x, 2))
    np.testing.assert_allclose(zigzag.from_zigzag(got, 2), want, atol=1e-5)
    np.testing.assert_allclose(sharded_loss, loss, atol=1e-5)


@pytest.mark.parametrize("name", ["renormalised", "choice of a step", "gated shared"])
def test_a_decoding_step_has_the_same_tokens_along_sequence(name: str) -> None:
    check(build(SPECS[name]), "sequence=2,expert=2,tensor=2", inputs(columns=1), cached=True)


def test_equal_scores_go_to_the_earliest_tokens_of_all_chips() -> None:
    layer = build(MoESpec(8, 16, ExpertChoice(capacity_factor=3.0)))
    x = jnp.broadcast_to(inputs(1, 1), (4, 8, D))
    want, _ = layer(x)
    got, _ = sharded(layer, "data=2,sequence=2,expert=2", sequence=True)(zigzag.to_zigzag(x, 2))
    np.testing.assert_allclose(zigzag.from_zigzag(got, 2), want, atol=1e-5)
    assert np.abs(np.diff(want, axis=1)).max() > 0.1, "not all tokens were chosen"


@pytest.mark.parametrize("mesh", MESHES[:2])
@pytest.mark.parametrize("among", ["one expert", "a few"])
def test_any_load(among: str, mesh: str, form: str) -> None:
    """All tokens to one expert, the most that a chip can get, and experts without any."""
    layer = build(MoESpec(8, 16, TokenChoice(top_k=1 if among == "one expert" else 3), bias=True))
    x = inputs().at[..., 0].set(4.0)
    for expert in (5,) if among == "one expert" else (1, 2, 5):
        layer.router.kernel[...] = layer.router.kernel[...].at[0, expert].add(10.0)
    check(layer, mesh, x)


@pytest.mark.parametrize("mesh", MESHES[1:3])
def test_experts_in_int8(mesh: str, form: str) -> None:
    layer = build(SPECS["clamped"])
    for weight in (layer.experts.up, layer.experts.gate, layer.experts.down):
        weight.set_value(round_to_nearest(weight[...]))
    check(layer, mesh, inputs())


def test_a_row_in_bfloat16_is_rounded_once_a_chip() -> None:
    layer, x = build(SPECS["clamped"], jnp.bfloat16), inputs().astype(jnp.bfloat16)
    want = layer(x)[0].astype(jnp.float32)
    got = sharded(layer, "expert=4,tensor=2")(x)[0].astype(jnp.float32)
    np.testing.assert_allclose(got, want, atol=2**-8 * float(jnp.abs(want).max()) * 4)


def test_gradients_through_gathered_rows() -> None:
    layer, x = build(SPECS["clamped"]), inputs()

    def loss(run):
        return jax.grad(lambda x: jnp.sum(jnp.sin(run(x)[0])))(x)

    np.testing.assert_allclose(loss(sharded(layer, "data=2,expert=2,tensor=2")), loss(layer), atol=2e-5)


def lowered(mesh: str, tokens: int, spec: MoESpec, *, exchange: bool, monkeypatch):
    """The layer of d_model 1024 compiled for eight v5e, with so many tokens a chip."""
    monkeypatch.setattr(experts, "PLAN_BYTES", -1e12 if exchange else 1e12)
    sizes = meshes.parse(mesh)
    made = topology.mesh("v5e:2x4", tuple(sizes.values()), tuple(sizes))
    layer = nnx.eval_shape(lambda: spec.build(1024, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, state = nnx.split(layer)
    leaves, tree = jax.tree.flatten(state)
    specs = [rules.spec(v.get_metadata()["logical_axes"]) for _, v in nnx.to_flat_state(state)]
    split = PartitionSpec(("data", "expert"))
    program = jax.shard_map(
        lambda leaves, x: nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x, cached=True)[0],
        mesh=made,
        in_specs=(specs, split),
        out_specs=split,
        check_vma=False,
    )

    def placed(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(made, spec))

    x = jax.ShapeDtypeStruct((tokens * sizes["data"] * sizes["expert"], 1, 1024), jnp.bfloat16)
    arguments = [placed(*pair) for pair in zip(leaves, specs, strict=True)], placed(x, split)
    return lower(program, *arguments, chip="v5e:2x4", mesh=made)


@needs_compiler
@pytest.mark.parametrize(("mesh", "chips"), [("expert=8", 8), ("expert=4,tensor=2", 4), ("tensor=8", 1)])
def test_gathered_on_tpus_sends_what_the_formula_says(mesh: str, chips: int, monkeypatch) -> None:
    n, d, k = 64, 1024, 4
    spec = MoESpec(16, 1024, TokenChoice(top_k=k), activation=ClampedGated(), bias=True)
    compiled = lowered(mesh, n, spec, exchange=False, monkeypatch=monkeypatch)
    assert compiled.text.count("grouped_matmul") >= 3
    over = {c: sum(u.sent for u in compiled.collectives if u.chips == c) for c in (chips, 8 // chips)}
    if chips > 1:
        routes = (chips - 1) * n * 2 * k * 4
        assert over[chips] == experts.gathered_bytes(n, d, 2, chips) + routes
    if chips < 8:
        # One all-reduce of what all experts made of the tokens, by the ring.
        ways = 8 // chips
        assert over[ways] == 2 * (ways - 1) / ways * n * d * 2


@needs_compiler
def test_exchanged_on_tpus_sends_only_real_rows(monkeypatch) -> None:
    n, k, chips = 512, 4, 8
    compiled = lowered(
        "expert=8", n, MoESpec(16, 1024, TokenChoice(top_k=k)), exchange=True, monkeypatch=monkeypatch
    )
    exchanged = re.findall(r"= bf16\[(\d+),.* ragged-all-to-all\(", compiled.text)
    assert sorted(map(int, exchanged)) == [k * n, chips * n]
    (routes,) = compiled.collectives
    assert (routes.kind, routes.sent) == ("all-gather", (chips - 1) * n * 2 * k * 4)
