"""Quantised models in the user's hands."""

from pathlib import Path

import jax
import numpy as np
import pytest
from quantised_models import DENSE, arrays, model

from jaxinf import LM, InputError
from jaxinf.checkpoint import save
from jaxinf.lm.architecture import architecture, weight_bytes
from jaxinf.quant import QTensor

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "plain", model(DENSE))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LM:
    return LM.from_pretrained(folder, quantize="int8")


def test_while_loading_or_after(folder: Path, loaded: LM) -> None:
    plain = LM.from_pretrained(folder)
    before = arrays(plain.model)
    after = plain.quantize("int8")
    assert arrays(after.model) == arrays(loaded.model)
    assert arrays(plain.model) == before
    assert isinstance(loaded.model.segments[0].blocks[0].ffn.up.kernel.get_value(), QTensor)
    near = np.abs(loaded.logits([PROMPT]) - plain.logits([PROMPT])).max()
    assert 0 < near < 0.05 * np.abs(plain.logits([PROMPT])).max()


@pytest.mark.filterwarnings("ignore:mesh=")
def test_on_a_mesh(folder: Path, loaded: LM) -> None:
    there = LM.from_pretrained(folder, mesh="tensor=2").quantize("int8")
    assert arrays(there.model) == arrays(loaded.shard("tensor=2").model)
    assert there.mesh is not None
    read = LM.from_pretrained(folder, mesh="tensor=2", quantize="int8")
    for a, b in zip(jax.tree.leaves(read.model), jax.tree.leaves(there.model), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_what_it_is_is_known_without_weights(loaded: LM, tmp_path: Path) -> None:
    kept = save(tmp_path / "kept", loaded.model)
    found = architecture(kept)
    assert (found.quantize, found.dtype) == ("int8", "float32")
    assert weight_bytes(kept) == loaded.model.segments[0].blocks[0].ffn.up.kernel.get_value().nbytes * 14 + 4 * sum(
        x.size for x in jax.tree.leaves(model(DENSE)) if x.ndim != 2 or x.shape != (64, 64)
    )
    with pytest.raises(InputError, match="quantised already"):
        LM.from_pretrained(kept, quantize="int8")
    with pytest.raises(InputError, match="quantised already"):
        loaded.quantize("int4")


def test_schemes_that_need_text_say_so(folder: Path) -> None:
    with pytest.raises(InputError, match="`jaxinf quantize SRC DST --scheme gptq --calibration FILE`"):
        LM.from_pretrained(folder, quantize="gptq")
    with pytest.raises(InputError, match="calibrated with text"):
        LM.from_pretrained(folder).quantize("gptq")
