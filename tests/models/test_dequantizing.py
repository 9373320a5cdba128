"""`dequantize`: the model that a quantised one stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import quantised_models as tiny
from flax import nnx

from jaxinf.compression import quantize
from jaxinf.models import dequantize
from jaxinf.quant import QTensor


def test_logits_stay_and_no_matrix_is_quantised() -> None:
    made = tiny.with_everything(tiny.model())
    made = tiny.changed(made, lambda _, q: dataclasses.replace(q, activations=None))
    wide = dequantize(made)
    values = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(wide))]
    assert not any(isinstance(value, QTensor) for value in values)
    assert {value.dtype for value in values} == {jnp.dtype("float32")}
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(wide(tokens), made(tokens), atol=1e-3)


def test_a_plain_model_stays_as_it_is() -> None:
    made = tiny.model()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(dequantize(made)), nnx.state(made))


def test_rounding_again_changes_nothing() -> None:
    made = quantize(tiny.model(), "int8")
    again = quantize(dequantize(made), "int8")
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(again(tokens), made(tokens), atol=0.05)
