"""Folders of drafting heads."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx

from jaxinf.checkpoint import load
from jaxinf.checkpoint.drafters import Drafting, is_drafter, load_drafter, rank_table, save_drafter
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models.drafting import (
    AheadSpec,
    AheadTokens,
    EagleHead,
    EagleSpec,
    MedusaHeads,
    MedusaSpec,
    fingerprint,
    narrowed,
)
from pallas_kernels.errors import CheckpointError, InputError

LAYER = LayerSpec(AttentionSpec(2, 1, 16, rope=RopeSpec(16)), FFNSpec(64))
EAGLE = EagleHead(EagleSpec(32, LAYER), rngs=nnx.Rngs(0))
HEADS = {
    "medusa": MedusaHeads(MedusaSpec(32, heads=2), rngs=nnx.Rngs(0)),
    "eagle": EAGLE,
    "mtp": EagleHead(EagleSpec(32, LAYER, modules=2), rngs=nnx.Rngs(0)),
    "pass": AheadTokens(AheadSpec(32, tokens=2), rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("form", ["int8", "int4", None])
def test_bit_for_bit(tmp_path, kind, form):
    made = Drafting(narrowed(HEADS[kind], form), "abc", ((0.5, 0.25), (0.4, 0.125)))
    assert save_drafter(tmp_path / "x", made) == tmp_path / "x"
    read = load_drafter(tmp_path / "x")
    assert (read.kind, read.target, read.ranks) == (kind, "abc", made.ranks)
    assert read.head.spec == made.head.spec
    jax.tree.map(np.testing.assert_array_equal, nnx.state(made.head), nnx.state(read.head))
    assert is_drafter(tmp_path / "x")
    wide = load_drafter(tmp_path / "x", dtype="float32")
    assert wide.head.dtype == np.float32


def test_such_a_folder_is_no_model_and_is_not_overwritten(tmp_path):
    save_drafter(tmp_path / "x", Drafting(EAGLE, "abc"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        save_drafter(tmp_path / "x", Drafting(EAGLE, "abc"))
    save_drafter(tmp_path / "x", Drafting(EAGLE, "def"), overwrite=True)
    assert load_drafter(tmp_path / "x").target == "def"
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"no folder of this kind|no drafter\.json"):
        save_drafter(tmp_path / "y", Drafting(EAGLE, "abc"), overwrite=True)


def test_heads_of_another_model_are_refused(tmp_path):
    one, other = (tiny_models.model(tiny_models.spec(), seed=seed) for seed in (0, 1))
    save_drafter(tmp_path / "x", Drafting(EAGLE, fingerprint(one)))
    assert load_drafter(tmp_path / "x", one).kind == "eagle"
    with pytest.raises(InputError, match="these eagle heads were trained for another model"):
        load_drafter(tmp_path / "x", other)


def test_what_is_wrong_is_said(tmp_path):
    folder = save_drafter(tmp_path / "x", Drafting(EAGLE, "abc"))
    file = folder / "drafter.json"
    good = json.loads(file.read_text())["jaxinf_drafter"]

    def says(match: str, **change) -> None:
        record = {k: v for k, v in (good | change).items() if v is not None}
        file.write_text(json.dumps({"jaxinf_drafter": record}))
        with pytest.raises(CheckpointError, match=match):
            load_drafter(folder)

    says("is version 2 of this format; this build reads 1", version=2)
    says("names the kind 'hydra'; known are medusa, eagle, mtp, pass", kind="hydra")
    says("names the kind 'mtp', but what it describes is eagle", kind="mtp")
    says("keys that are not understood: colour", colour="red")
    says("does not describe drafting heads", spec={"type": "EagleSpec", "d_model": 32})
    says("does not describe drafting heads", dtype="float99")
    says("missing: modules.1", kind="mtp", spec=good["spec"] | {"modules": 2})
    says("of another shape", spec=good["spec"] | {"d_model": 16})
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="is version null"):
        load_drafter(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no drafter\.json"):
        load_drafter(folder)


def test_ranks_count_what_was_measured():
    found = np.asarray([[0, 2], [0, -1], [1, 0], [30, 0]])
    assert rank_table(found, 3) == ((0.5, 0.25, 0.0), (pytest.approx(2 / 3), 0.0, pytest.approx(1 / 3)))
    assert replace(Drafting(EAGLE, "abc"), ranks=rank_table(found)).ranks[0][1] == 0.25
