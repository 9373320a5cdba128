"""Loading onto meshes of eight emulated devices: the same parameters, and no more read than they need."""

import ctypes
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxinf import aot
from jaxinf.aot.memory import of as memory_of
from jaxinf.checkpoint import convert, load, progress, save, save_orbax, stacks, streaming
from jaxinf.checkpoint.orbax import write_orbax
from jaxinf.checkpoint.pages import MappedFile
from jaxinf.checkpoint.tensors import MappedTensors
from jaxinf.models import CausalLM
from jaxinf.models.placing import place_model
from pallas_kernels.errors import CheckpointError, InputError
from sharding import meshes, row_major

GOLDENS = Path(__file__).parents[1] / "goldens"
pytestmark = pytest.mark.filterwarnings("ignore:mesh=")


def values(model: CausalLM) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def assert_same(got: CausalLM, want: CausalLM) -> None:
    expected = values(want)
    for name, value in values(got).items():
        assert value.sharding == expected[name].sharding, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


CASES = [
    # Plain; queries, keys and values in one matrix; experts stored one by one; experts in one tensor, sinks.
    ("llama", "list", "data=2,tensor=4"),
    ("llama", "stacked", "pipeline=2,tensor=2"),
    ("falcon_new", "list", "tensor=2"),
    ("falcon_new", "stacked", "tensor=4"),
    ("mixtral", "list", "expert=2,tensor=2"),
    ("mixtral", "stacked", "expert=4"),
    ("gpt_oss", "stacked", "expert=2,tensor=4"),
    ("gpt2", "stacked", "tensor=2"),
]


@pytest.mark.parametrize(("case", "layout", "mesh"), CASES)
def test_a_checkpoint_is_read_onto_a_mesh(case: str, layout, mesh: str) -> None:
    whole = load(GOLDENS / case, layout=layout).model
    assert_same(load(GOLDENS / case, layout=layout, mesh=mesh).model, place_model(whole, meshes.make(mesh)))


@pytest.mark.parametrize(("case", "layout", "mesh"), [CASES[0], CASES[1], CASES[6]])
def test_orbax_restores_to_any_mesh(case: str, layout, mesh: str, tmp_path: Path) -> None:
    folder = convert(GOLDENS / case, tmp_path / "kept", to="orbax", dtype="bfloat16")
    whole = load(folder, layout=layout).model
    assert_same(load(folder, layout=layout, mesh=mesh).model, place_model(whole, meshes.make(mesh)))


@pytest.mark.parametrize("keep", [save, save_orbax])
@pytest.mark.parametrize(("layout", "mesh"), [("list", "tensor=4"), ("stacked", "pipeline=2,tensor=4")])
def test_what_lies_on_a_mesh_is_written_as_it_was(keep, layout, mesh: str, tmp_path: Path) -> None:
    whole = load(GOLDENS / "llama", layout=layout).model
    folder = keep(tmp_path / "kept", place_model(whole, meshes.make(mesh)))
    assert_same(load(folder, layout=layout).model, whole)


@pytest.mark.parametrize("mesh", ["pipeline=2,tensor=2", "tensor=4", "expert=2,tensor=2"])
def test_a_stack_is_put_together_on_its_device_layer_by_layer(mesh: str, monkeypatch) -> None:
    whole = load(GOLDENS / "mixtral", layout="stacked").model
    monkeypatch.setattr(streaming, "_by_layer", lambda nbytes, mesh: True)
    shapes = []
    gather = streaming._Piece.gather
    monkeypatch.setattr(streaming._Piece, "gather", lambda piece: (shapes.append(piece), gather(piece))[1])
    assert_same(load(GOLDENS / "mixtral", layout="stacked", mesh=mesh).model, place_model(whole, meshes.make(mesh)))
    assert all(p.index[0].stop - p.index[0].start == 1 for p in shapes if p.wanted.stacked)


@pytest.mark.skipif(not aot.available(), reason="needs libtpu")
@pytest.mark.compile
def test_on_a_tpu_a_layer_is_written_into_its_stack_in_place() -> None:
    mesh = Mesh(np.array(aot.devices("v5e:2x2")), ("device",))
    format = row_major(3, NamedSharding(mesh, PartitionSpec("device")))
    stack, layer = (jax.ShapeDtypeStruct((4 * n, 2880, 1440), jnp.bfloat16, sharding=format) for n in (16, 1))
    compiled = stacks.writer(mesh, 3).lower(stack, layer, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    memory = memory_of(compiled)
    assert memory.aliases >= stack.size * 2 // 4
    assert memory.temporaries < layer.size * 2 // 4


def resident(path: Path) -> int:
    """Pages of a file that are in memory."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        found = ctypes.CDLL(None).mincore(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(size), pages)
        del data
        assert found == 0
        return sum(page & 1 for page in pages)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_columns_are_read_without_what_lies_between_them(tmp_path: Path) -> None:
    path, rows, columns = tmp_path / "matrix", 256, 16384
    path.write_bytes(bytes(rows * columns * 4))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system keeps files in memory")
    mapped = MappedFile(path)
    part = mapped.data.view(np.float32).reshape(rows, columns)[:, columns // 4 : columns // 2]
    mapped.expect(part.T)
    assert part.sum() == 0
    assert resident(path) == part.nbytes // mmap.PAGESIZE


@pytest.mark.parametrize(
    ("to", "layout"), [("safetensors", "stacked"), ("safetensors", "list"), ("orbax", "stacked")]
)
def test_what_is_not_finite_is_named_wherever_it_lies(to, layout, golden, tmp_path: Path) -> None:
    folder = convert(golden("llama"), tmp_path / "kept")
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.ffn.down.kernel"][-1, -1] = np.nan
    save_file(tensors, folder / "model.safetensors")
    if to == "orbax":
        spoilt = tmp_path / "orbax"
        spoilt.mkdir()
        config = json.loads((folder / "config.json").read_text()) | {"weights": "orbax"}
        (spoilt / "config.json").write_text(json.dumps(config))
        write_orbax(spoilt, tensors)
        folder = spoilt
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.down\.kernel holds values that are NaN"):
        load(folder, mesh="data=2,tensor=4", layout=layout)


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read(monkeypatch) -> None:
    monkeypatch.setattr(MappedTensors, "read", None)
    with pytest.raises(InputError, match="tensor=3 does not divide the model's heads=4"):
        load(GOLDENS / "llama", mesh="tensor=3")
    with pytest.raises(InputError, match="needs 16 devices, but there are 8"):
        load(GOLDENS / "llama", mesh="tensor=16")


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=4"])
def test_progress_counts_the_bytes_that_this_process_places(mesh) -> None:
    calls: list[tuple[int, int]] = []
    model = load(GOLDENS / "llama", mesh=mesh, progress=lambda *at: calls.append(at)).model
    total = sum(value.nbytes for value in values(model).values())  # all parts are here, once each
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


TERMINAL = """
import sys
import jaxinf.checkpoint.progress as progress
progress.PATIENCE = float(sys.argv[2])
from jaxinf.checkpoint import load
load(sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize(("patience", "drawn"), [("0", True), ("600", False)])
def test_a_bar_is_drawn_on_a_terminal_when_it_takes_long(patience: str, drawn: bool) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", TERMINAL, str(GOLDENS / "llama"), patience]
    root = Path(__file__).parents[2]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    said = b""
    with subprocess.Popen(command, cwd=root, env=env, stderr=theirs) as process:
        os.close(theirs)
        while chunk := _read(ours):  # all along: a terminal holds a few thousand bytes
            said += chunk
    os.close(ours)
    assert process.returncode == 0, said
    assert (b"loading llama" in said and b"/s" in said) == drawn
    assert drawn or not said


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_without_a_terminal_nothing_is_drawn(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    load(GOLDENS / "llama")
    assert capsys.readouterr() == ("", "")
