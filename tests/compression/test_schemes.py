"""Which matrix becomes what, and what is refused."""

import functools

import jax
import pytest
from flax import nnx

from jaxinf.compression import SCHEMES, plan, quantize, scheme_of
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, Segment
from jaxinf.quant import QTensor
from pallas_kernels.errors import InputError

ATTENTION = AttentionSpec(4, 2, 8, rope=RopeSpec(8))
SPEC = ModelSpec(
    64, 32, (Segment((LayerSpec(ATTENTION, FFNSpec(64)), LayerSpec(ATTENTION, MoESpec(4, 32))), 2),), context=64
)


@functools.cache
def abstract(layout="list") -> CausalLM:
    return nnx.eval_shape(lambda: CausalLM(SPEC, rngs=nnx.Rngs(0), layout=layout))


def formats(planned) -> dict[str, str | None]:
    return {name: target and target.format.name for name, target in planned.items()}


def test_every_matrix_of_attention_and_feed_forward_parts_is_planned_for():
    names = set(plan(abstract(), "int8"))
    assert names == set(plan(abstract("stacked"), "int8"))
    assert {"layers.0.attention.query", "layers.3.ffn.experts.down", "layers.2.ffn.gate"} <= names
    assert not [n for n in names if "router" in n or "norm" in n or "embed" in n]


def test_the_last_rule_that_matches_counts():
    rules = {"layers.*.attention.*": "int8", "layers.0.*": "keep", "*.ffn.down.kernel": "nf4"}
    found = formats(plan(abstract(), "int4", rules=rules))
    assert found["layers.1.attention.out"] == "int8"
    assert found["layers.0.attention.out"] is None
    assert found["layers.0.ffn.up"] is None
    assert found["layers.0.ffn.down"] == "nf4"
    assert found["layers.2.ffn.down"] == "nf4"
    assert found["layers.1.ffn.experts.down"] == "int4"


def test_rules_and_the_methods():
    found = plan(abstract(), "gptq", group=16, rules={"*.out": "int8", "*.down": "fp8_e4m3"})
    assert (found["layers.0.attention.out"].method, found["layers.0.attention.out"].group) == ("gptq", 32)
    assert found["layers.0.ffn.down"].method == "nearest"
    assert (found["layers.0.ffn.up"].method, found["layers.0.ffn.up"].group) == ("gptq", 16)
    found = plan(abstract(), "smoothquant", rules={"*.out": "int8"})
    assert (found["layers.0.attention.out"].method, found["layers.0.attention.out"].activations) == (
        "nearest",
        None,
    )
    assert found["layers.0.ffn.up"].activations == "int8"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(scheme="int3"), "int8, int4"),
        (dict(scheme="int4", rules={"layer.*": "int8"}), r"matches nothing; there are layers.0.attention"),
        (dict(scheme="int4", rules={"layers.*": "int5"}), "'int5' must be 'keep' or one of int8"),
        (dict(scheme="int4", group=24), r"layers.0.attention.*24 does not divide the 32.*1, 2, 4, 8, 16, 32"),
        (dict(scheme="nf4"), "nf4 has groups of 64 rows"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        plan(abstract(), **arguments)


def test_stacked_layers_are_treated_alike():
    with pytest.raises(InputError, match='layout="list"'):
        plan(abstract("stacked"), "int4", rules={"layers.0.*": "int8"})
    assert (
        formats(plan(abstract("stacked"), "int4", rules={"*.attention.*": "int8"}))["layers.2.attention.out"]
        == "int8"
    )


@pytest.mark.parametrize("layout", ["list", "stacked"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_abstract_models_have_the_shapes_of_a_scheme(scheme, layout):
    more = dict(group=16) if scheme == "nf4" else {}
    if scheme == "llm-int8":
        with pytest.raises(InputError, match="outliers="):
            quantize(abstract(layout), scheme)
        more = dict(outliers=3)
    made = quantize(abstract(layout), scheme, **more)
    found = made.segments[0].blocks[1]
    down = found.ffn.experts.down.get_value()
    assert isinstance(down, QTensor)
    lead = (2,) if layout == "stacked" else ()
    assert down.shape == (*lead, 4, 32, 32)
    assert isinstance(down.values, jax.ShapeDtypeStruct)
    assert (down.activations is None) == (scheme_of(scheme).activations is None or scheme == "llm-int8")
    assert (down.rows is not None) == (scheme == "llm-int8")
    with pytest.raises(InputError, match="quantised already"):
        quantize(made, "int8")
