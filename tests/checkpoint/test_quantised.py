"""Quantised models in files: bit for bit there and back, and rounded while they are read."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import together
from quantised_models import DENSE, SPARSE, arrays, changed, dequantised, model, rounded, stacked, with_everything

from jaxinf import compression
from jaxinf.checkpoint import convert, load, rounding, save, save_orbax
from jaxinf.checkpoint.packing import pack, unpack
from jaxinf.checkpoint.parameters import Slot
from jaxinf.checkpoint.tensors import open_tensors
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import ModelSpec, fold
from jaxinf.models.placing import place_model
from jaxinf.quant import FORMATS
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError
from sharding import meshes

pytestmark = pytest.mark.filterwarnings("ignore:mesh=")


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float8_e8m0fnu"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 7), (1,), (5, 1), (0, 4)])
def test_packed_and_unpacked(dtype: str, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    x = raw.view(jnp.float8_e8m0fnu) if dtype.startswith("float8") else raw.astype(np.int8).astype(jnp.dtype(dtype))
    packed = pack(x)
    assert packed.dtype == np.uint8
    assert packed.shape[-1] == -(-shape[-1] * {"int2": 2}.get(dtype, 4 if "int" in dtype else 8) // 8)
    back = unpack(packed, dtype, shape[-1])
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back.view(np.uint8), x.view(np.uint8))


def test_low_bits_come_first() -> None:
    assert pack(np.asarray([1, -2, 3], np.int8).astype(jnp.int4)).tolist() == [0xE1, 0x03]
    assert pack(np.asarray([1, -1, 0, -2, 1], np.int8).astype(jnp.int2)).tolist() == [0b10001101, 1]


@pytest.fixture(scope="module")
def everything() -> dict:
    """Models with matrices in every format: `(spec's name, layout)`."""
    made = with_everything(model(SPARSE))
    return {"list": made, "stacked": stacked(made)}


@pytest.mark.parametrize("write", [save, save_orbax])
def test_bit_for_bit_there_and_back(write, everything: dict, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", everything["list"])
    assert arrays(load(folder, layout="list").model) == arrays(everything["list"])
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["scheme"] == "mixed"
    assert [n for n in config["quantization"]["activations"] if n.endswith("attention.key.kernel")]
    again = convert(folder, tmp_path / "n", to="orbax" if write is save else "safetensors")
    assert arrays(load(again, layout="list").model) == arrays(everything["list"])


def test_layouts_are_the_readers_choice(everything: dict, tmp_path: Path) -> None:
    for layout, other in (("list", "stacked"), ("stacked", "list")):
        folder = save(tmp_path / layout, everything[layout])
        assert arrays(load(folder, layout=other).model) == arrays(everything[other])


@pytest.mark.parametrize(
    ("spec", "layout", "mesh"),
    [(DENSE, "list", "tensor=4"), (DENSE, "stacked", "pipeline=2,tensor=2"), (SPARSE, "list", "expert=2,tensor=2")],
)
@pytest.mark.parametrize("write", [save, save_orbax])
def test_onto_a_mesh(spec, layout: str, mesh: str, write, tmp_path: Path) -> None:
    def change(path, w):
        return rounded(w, name="int4", group=32) if "down" in path else rounded(w, name="mxfp4")

    whole = changed(model(spec, layout), change)
    folder = write(tmp_path / "m", whole)
    got, want = load(folder, layout=layout, mesh=mesh).model, place_model(whole, meshes.make(mesh))
    assert arrays(got) == arrays(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding == b.sharding
    # And from the mesh to a file: groups that two chips share lie there twice.
    back = load(save(tmp_path / "n", got), layout=layout).model
    for a, b in zip(jax.tree.leaves(dequantised(back)), jax.tree.leaves(dequantised(whole)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_of_a_stack_keep_as_many_rows_wide(tmp_path: Path) -> None:
    whole = model(DENSE)
    for i, kept in enumerate(([3], [5, 9])):
        kernel = whole.segments[0].blocks[i].ffn.up.kernel
        rows = jnp.asarray(kept, jnp.int32)
        q = rounded(kernel.get_value().at[rows].set(0))
        kernel.set_value(dataclasses.replace(q, rows=rows, outliers=kernel.get_value()[rows]))
    plain = whole.segments[0].blocks[0].ffn.down.kernel
    plain.set_value(rounded(plain.get_value()))
    q = rounded(whole.segments[0].blocks[1].ffn.down.kernel.get_value())
    one = jnp.zeros(1, jnp.int32)
    wide = dataclasses.replace(q, rows=one, outliers=jnp.ones((1, 64)))
    whole.segments[0].blocks[1].ffn.down.kernel.set_value(wide)
    stacked = load(save(tmp_path / "m", whole), layout="stacked").model.segments[0].blocks[0].ffn
    assert stacked.up.kernel.get_value().rows.tolist() == [[3, -1], [5, 9]]
    assert stacked.down.kernel.get_value().rows.tolist() == [[-1], [0]]
    for i, block in enumerate(whole.segments[0].blocks):
        for name in ("up", "down"):
            got = getattr(stacked, name).kernel.get_value().dequantize()[i]
            np.testing.assert_array_equal(got, getattr(block.ffn, name).kernel.get_value().dequantize())


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    save(tmp_path / "m", changed(model(), lambda _, w: rounded(w, name="int4", group=32)))
    found = open_tensors(tmp_path / "m")
    codes = found["layers.1.ffn.up.kernel.values.int4"]
    assert (str(codes.dtype), codes.shape) == ("uint8", (64, 32))
    assert found["layers.1.ffn.up.kernel.scales"].shape == (2, 64)
    assert str(found["head.kernel"].dtype) == "float32"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization"] == {"version": 1, "scheme": "int4", "activations": None}
    assert config["version"] == 1
    save(tmp_path / "n", changed(model(), lambda _, w: rounded(w, name="int4", group=32)), scheme="gptq")
    assert json.loads((tmp_path / "n" / "config.json").read_text())["quantization"]["scheme"] == "gptq"


def test_metadata_that_is_not_known(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", changed(model(), lambda _, w: rounded(w)))
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes) -> None:
        quantization = config["quantization"] | changes
        (folder / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
        with pytest.raises(CheckpointError, match=match):
            load(folder)

    refused("quantization is version 2; this build reads 1", version=2)
    refused("names the scheme 'int5', which this build does not know; it knows int8, int4", scheme="int5")
    refused("keys that are not understood: rotation", rotation=True)
    refused("has activations='int4'", activations="int4")


def test_codes_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = save(tmp_path / "m", changed(model(), lambda _, w: rounded(w, name="int4", group=32)))
    whole = load_file(folder / "model.safetensors")
    name = "layers.1.ffn.up.kernel"

    def refused(change, match: str, **options) -> None:
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises((CheckpointError, UnsupportedError), match=match):
            load(folder, **options)

    refused(lambda t: t.pop(f"{name}.scales"), "up.kernel.values.int4 .* is not packed as .*scales says")
    wide = np.ones((2, 65), np.float32)
    refused(lambda t: t.update({f"{name}.scales": wide}), "is not packed as")
    refused(lambda t: t.pop(f"{name}.values.int4"), "keeps of layers.1.ffn.up.kernel scales, where")
    refused(lambda t: t.update({f"{name}.zeros": np.zeros((2, 64), np.float32)}), "take layout", layout="stacked")
    sick = np.full((2, 64), np.nan, np.float32)
    refused(lambda t: t.update({f"{name}.scales": sick}), f"{name}.scales holds values that are NaN")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("plain")
    save_orbax(at / "orbax", model(DENSE, dtype=jnp.bfloat16))
    return {
        "dense": save(at / "dense", model(DENSE, dtype=jnp.bfloat16)),
        "sparse": save(at / "sparse", model(SPARSE, dtype=jnp.bfloat16)),
        "orbax": at / "orbax",
    }


@pytest.mark.parametrize("scheme", FORMATS)
def test_rounded_while_read_is_what_rounding_makes_of_it(scheme: str, published: dict[str, Path]) -> None:
    both = [("sparse", "stacked"), ("dense", "list")]
    for name, layout in both[1:] if scheme.startswith("kmeans") else both if scheme == "int8" else both[:1]:
        want = compression.quantize(load(published[name], layout=layout).model, scheme)
        assert arrays(load(published[name], layout=layout, quantize=scheme).model) == arrays(want), layout


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_e4m3", "nf4"])
def test_columns_are_rounded_some_at_a_time(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_BLOCK", 64 * 128)
    w = jax.random.normal(jax.random.key(1), (2, 64, 300))
    seen = []

    def read(index):
        seen.append(index)
        return np.asarray(w)[index]

    slot = Slot(("w",), ("w",), False, jax.ShapeDtypeStruct(w.shape, w.dtype))
    matrix = rounding._Matrix(slot, read, rounding.Rounding.of(scheme), rounding._Kept())
    want = rounded(w, name=scheme)
    values = matrix.read("values", (slice(0, 2), slice(8, 64), slice(10, 290)))
    scales = matrix.read("scales", (slice(0, 2),) + (slice(0, 1),) * (want.scales.ndim - 2) + (slice(10, 290),))
    np.testing.assert_array_equal(values.astype(np.float32), np.asarray(want.values, np.float32)[:, 8:, 10:290])
    np.testing.assert_array_equal(scales.reshape(2, -1, 280)[:, 0], want.scales.reshape(2, -1, 300)[:, 0, 10:290])
    # What belongs together was read once, all rows of no more columns than were asked for.
    assert {s[2].start for s in seen} == {10, 138, 266}
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("name", "layout", "mesh", "scheme"),
    [
        ("dense", "list", "tensor=4", "int8"),
        ("dense", "stacked", "pipeline=2,tensor=2", "int4"),
        ("sparse", "list", "expert=2,tensor=2", "ternary"),
        ("sparse", "stacked", "tensor=2", "kmeans4"),
        ("orbax", "list", "tensor=2", "nf4"),
    ],
)
def test_rounded_onto_a_mesh(name: str, layout: str, mesh: str, scheme: str, published: dict[str, Path]) -> None:
    whole = compression.quantize(load(published[name], layout=layout).model, scheme)
    got = load(published[name], layout=layout, mesh=mesh, quantize=scheme).model
    want = place_model(whole, meshes.make(mesh))
    assert arrays(got) == arrays(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding == b.sharding


def test_what_cannot_be_rounded(published: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantize='int5' must be one of int8, int4, .*, w8a8"):
        load(published["dense"], quantize="int5")
    folder = save(tmp_path / "m", load(published["dense"], quantize="w8a8").model)
    assert json.loads((folder / "config.json").read_text())["quantization"] == {
        "version": 1,
        "scheme": "w8a8",
        "activations": "int8",
    }
    with pytest.raises(InputError, match=r"is quantised already \(w8a8\); give the original"):
        load(folder, quantize="int8")
    sick = model(DENSE)
    kernel = sick.segments[0].blocks[1].ffn.up.kernel
    kernel.set_value(kernel.get_value().at[5, 6].set(jnp.inf))
    save(tmp_path / "sick", sick)
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.up\.kernel holds values that are NaN or infinite"):
        load(tmp_path / "sick", quantize="int8")


READS = """
from jaxinf.checkpoint import load
from jaxinf.checkpoint.tensors import MappedTensors
touched, expect = {}, MappedTensors.expect
def note(self, name, view):
    touched[name] = touched.get(name, 0) + view.nbytes
    expect(self, name, view)
MappedTensors.expect = note
found = {}
for folder, scheme in ((arguments[0], "int8"), (arguments[1], None)):
    touched.clear()
    ffn = load(folder, mesh="tensor=8", layout="list", quantize=scheme).model.segments[0].blocks[0].ffn
    up, down = ffn.up.kernel.get_value(), ffn.down.kernel.get_value()
    arrays = dict(values=hosts.fetch(up.values).tolist(), scales=hosts.fetch(down.scales).tolist())
    found["rounded" if scheme else "kept"] = dict(arrays, touched=dict(touched))
tell(**found)
"""


def test_each_process_reads_the_columns_that_its_devices_hold(tmp_path: Path) -> None:
    layer = LayerSpec(AttentionSpec(8, 8, 8, rope=RopeSpec(8)), FFNSpec(64))
    plain = model(ModelSpec(40, 64, fold([layer]), 64))
    whole = compression.quantize(plain, "int8")
    folders = str(save(tmp_path / "plain", plain)), str(save(tmp_path / "whole", whole))
    ffn = whole.segments[0].blocks[0].ffn
    for told in together(READS, tmp_path, folders):
        for found in told.values():
            assert found["values"] == ffn.up.kernel.get_value().values.tolist()
            np.testing.assert_array_equal(found["scales"], ffn.down.kernel.get_value().scales)
        assert told["rounded"]["touched"]["layers.0.ffn.up.kernel"] == 64 * 64 * 4 // 2
        assert told["kept"]["touched"]["layers.0.ffn.up.kernel.values"] == 64 * 64 // 2
        assert told["kept"]["touched"]["layers.0.ffn.down.kernel.values"] == 64 * 64 // 2
