"""What calibrated schemes reach on the embedded model, on text that it was not trained on."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxinf import checkpoint
from jaxinf.compression import Calibration, divergence, plant_outliers, quantize
from jaxinf.training.corpus import default_root, find_files, load_manifest, read_held_out

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "bfloat16" / "stdlib"
HELD_OUT = ROOT / "tests" / "data" / "stdlib_heldout.xz"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(FOLDER, dtype="float32").model


@pytest.fixture(scope="module")
def calibration(tokenizer) -> Calibration:
    """Of this interpreter's standard library, without what is held out or near it."""
    kept = {entry.path for entry in load_manifest().part("train")}
    texts = [text.decode() for path, text in find_files(default_root()) if path in kept]
    random.Random(1).shuffle(texts)
    return Calibration.of_texts(texts, lambda text: tokenizer.encode(text).ids, rows=32)


@pytest.fixture(scope="module")
def text(tokenizer) -> np.ndarray:
    whole = "".join(data.decode() for data in read_held_out(HELD_OUT).values())
    ids = np.asarray(tokenizer.encode(whole).ids)
    rows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    return rows[:: len(rows) // 8][:8]


def test_four_bits(model, calibration, text):
    nearest = divergence(model, quantize(model, "int4", group=64), text).kl
    for scheme in ("gptq", "awq"):
        other = quantize(model, scheme, group=64, calibration=calibration)
        assert divergence(model, other, text).kl <= 0.7 * nearest, scheme


def test_planted_outliers(model, calibration, text):
    planted = plant_outliers(model, [3, 77, 100])
    assert abs(divergence(model, planted, text).kl) < 1e-6
    kl = {
        scheme: divergence(model, quantize(planted, scheme, calibration=calibration), text).kl
        for scheme in ("int8", "w8a8", "smoothquant", "llm-int8")
    }
    assert kl["smoothquant"] <= 0.5 * kl["w8a8"]
    assert kl["llm-int8"] <= 2 * kl["int8"]


def test_int8(model, text):
    found = divergence(model, quantize(model, "int8"), text)
    assert found.agreement >= 0.98
    assert divergence(model, quantize(model, "int8"), text, same_routing=True).kl < min(1e-3, found.kl)
