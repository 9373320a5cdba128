"""What the model's traced program looks like: its precision and its size."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import CausalLM, ModelSpec, fold

WINDOW = LayerSpec(AttentionSpec(4, 2, 8, rope=RopeSpec(8), window=5), FFNSpec(24))
MIXTURE = LayerSpec(
    AttentionSpec(4, 2, 8, rope=RopeSpec(8)), MoESpec(4, 8, TokenChoice(top_k=2), shared=FFNSpec(8))
)


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def traced(repeats: int, dtype, tokens: int):
    spec = ModelSpec(16, 16, fold([WINDOW, MIXTURE] * repeats), 64)

    def run(tokens):
        model = CausalLM(spec, rngs=nnx.Rngs(0), param_dtype=dtype, layout="stacked")
        graph, params = nnx.split(model)

        def step(params, tokens, cache):
            model = nnx.merge(graph, params)
            hidden, cache, _ = model.hidden(tokens, cache)
            return model.logits(hidden), cache

        return jax.make_jaxpr(step)(params, tokens, model.init_cache(2, 32))

    return run(jnp.zeros((2, tokens), jnp.int32)).jaxpr


@pytest.mark.parametrize("tokens", [1, 24])
def test_float32_means_float32(tokens):
    """A TPU multiplies float32 in bfloat16 passes unless each product says HIGHEST."""
    products = [e for e in equations(traced(1, jnp.float32, tokens)) if "dot_general" in e.primitive.name]
    assert len(products) > 10
    for eqn in products:
        assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2, eqn


@pytest.mark.parametrize("tokens", [1, 24])
def test_bfloat16_accumulates_in_float32(tokens):
    products = [e for e in equations(traced(1, jnp.bfloat16, tokens)) if "dot_general" in e.primitive.name]
    assert len(products) > 10
    for eqn in products:
        assert eqn.outvars[0].aval.dtype == jnp.float32, eqn


def test_a_deeper_stack_is_no_larger_program():
    """Eighty stacked layers compile in about the time of eight: the scan's body is traced once."""
    sizes = {n: sum(1 for _ in equations(traced(n, jnp.float32, 1))) for n in (2, 12)}
    assert sizes[2] == sizes[12]
