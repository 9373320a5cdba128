"""Saved programs: used where they fit, refused with one warning where anything differs, never run as pickles."""

import hashlib
import io
import json
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import model, spec

from jaxinf import LM
from jaxinf.aot import executables, export, trees
from jaxinf.cache import Cache, DenseCache, Floats
from jaxinf.quant import QTensor
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError

PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "programs"
    entries = LM(model(spec())).save_programs(folder, [8, 40], 8, batch=2)
    assert [entry["name"] for entry in entries] == ["append", "first", "decode", "append"]
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """Programs that may be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "programs"))


def generate(lm: LM, **options) -> list[list[int]]:
    return [out.tokens for out in lm.generate(PROMPTS, 8, eos=(), **options)]


def test_saved_programs_are_neither_compiled_nor_traced(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = generate(LM(model(spec())))
    lm = LM(model(spec()), programs=saved)
    traced = []
    monkeypatch.setattr("jaxinf.generation.loop.append_piece", lambda *a, **k: traced.append("append"))
    monkeypatch.setattr("jaxinf.generation.loop.decode", lambda *a, **k: traced.append("decode"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(lm) == want
        long = [list(range(1, 38))] * 2
        assert len(lm.generate(long, 8, eos=())) == 2, "another bucket of prompts, saved too"
    assert traced == []


def test_other_weights_of_the_same_shapes_are_served(saved: Path) -> None:
    want = generate(LM(model(spec(), seed=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(LM(model(spec(), seed=1), programs=saved)) == want


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,tensor=2"])
@pytest.mark.filterwarnings("ignore:mesh=")
def test_programs_of_a_mesh(mesh: str, tmp_path: Path) -> None:
    lm = LM(model(spec())).shard(mesh)
    want = generate(lm)
    lm.save_programs(tmp_path / "programs", 8, 8, batch=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled as ever")
        again = LM(LM(model(spec())).shard(mesh).model, programs=tmp_path / "programs")
        assert generate(again) == want
    with pytest.warns(UserWarning, match="mesh was {'"):
        LM(model(spec()), programs=tmp_path / "programs")


def told(folder: Path, lm_model=None, **options) -> tuple[str, list[list[int]]]:
    """The one warning, and the tokens that come all the same."""
    with pytest.warns(UserWarning, match="compiled as ever") as caught:
        tokens = generate(LM(model(spec()) if lm_model is None else lm_model, programs=folder), **options)
    assert len(caught) == 1, "once, whatever follows"
    return str(caught[0].message), tokens


def change(folder: Path, **made) -> None:
    path = folder / export.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["made"] |= made
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (dict(jaxlib="0.0.1"), "jaxlib was '0.0.1', is "),
        (dict(platform="tpu", device="TPU v5 lite"), "platform was 'tpu', is 'cpu'; device was 'TPU v5 lite'"),
        (dict(sources="other"), "sources changed"),
        (dict(flags={"XLA_FLAGS": "--other"}), "flags changed"),
        (dict(processor="x"), "processor was 'x'"),
    ],
)
def test_a_manifest_that_does_not_fit_is_told_of_once(copy: Path, made: dict, says: str) -> None:
    change(copy, **made)
    message, tokens = told(copy)
    assert says in message
    assert "`jaxinf compile`" in message
    assert tokens == generate(LM(model(spec())))


@pytest.mark.parametrize(
    "other",
    [
        model(spec(window=4)),
        model(spec(vocab=65)),
        model(spec(), layout="stacked"),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), model(spec())),
    ],
    ids=["architecture", "shapes", "layout", "dtype"],
)
def test_a_model_that_changed_is_told_of(saved: Path, other) -> None:
    message, tokens = told(saved, other)
    assert "model changed" in message
    assert tokens == generate(LM(other))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_a_file_that_changed_is_told_of(copy: Path, spoil, says: str) -> None:
    spoil(copy / "append-0.bin")
    message, tokens = told(copy)
    assert says in message
    assert tokens == generate(LM(model(spec())))


def test_calls_of_other_sizes_and_options_are_compiled_and_told_of(saved: Path) -> None:
    message, _ = told(saved, temperature=1.0)
    assert "no program for a call of these sizes and options" in message
    lm = LM(model(spec()), programs=saved)
    with pytest.warns(UserWarning, match="no program"):
        assert lm.generate([1, 2, 3], 8, eos=()).tokens == LM(model(spec())).generate([1, 2, 3], 8, eos=()).tokens


def test_what_holds_no_programs_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no programs"):
        LM(model(spec()), programs=tmp_path)
    for text in ("{", "[]", '{"programs": [], "made": 3}'):
        (copy / export.MANIFEST).write_text(text)
        with pytest.raises(InputError, match="is no manifest"):
            LM(model(spec()), programs=copy)


class Harm:
    def __reduce__(self):
        return eval, ("__import__('builtins').__dict__.setdefault('harmed', True)",)


def test_a_file_that_would_run_code_is_refused_and_does_not(copy: Path) -> None:
    import builtins

    payload = pickle.dumps(Harm())
    (copy / "append-0.bin").write_bytes(payload)
    manifest = json.loads((copy / export.MANIFEST).read_text())
    manifest["programs"][0]["sha256"] = hashlib.sha256(payload).hexdigest()
    (copy / export.MANIFEST).write_text(json.dumps(manifest))
    message, tokens = told(copy)
    assert "names builtins.eval, which no executable needs" in message
    assert not hasattr(builtins, "harmed")
    assert tokens == generate(LM(model(spec())))
    pickle.load(io.BytesIO(payload))  # the file does what the test believes it to do
    assert builtins.__dict__.pop("harmed")


def test_a_folder_is_whole_or_not_there(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(model(spec()))
    with pytest.raises(CheckpointError, match="exists already"):
        lm.save_programs(saved, 8, 8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not replaced"):
        lm.save_programs(tmp_path / "mine", 8, 8, overwrite=True)

    def fails(compiled):
        raise UnsupportedError("cannot")

    monkeypatch.setattr(executables, "dump", fails)
    with pytest.raises(UnsupportedError, match="cannot"):
        lm.save_programs(tmp_path / "new", 8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_programs_are_replaced_if_asked(copy: Path) -> None:
    LM(model(spec())).save_programs(copy, 8, 8, batch=1, overwrite=True)
    manifest = json.loads((copy / export.MANIFEST).read_text())
    assert [p["name"] for p in manifest["programs"]] == ["append", "first", "decode"]
    files = {export.MANIFEST, *(p["file"] for p in manifest["programs"])}
    assert {path.name for path in copy.iterdir()} == files


def test_structures_survive_as_json() -> None:
    cache = DenseCache(Floats(1, 2))
    tree = jax.tree.structure(((Cache(((cache,), (cache, cache)), 3), None), [QTensor(1, 2)], {"b": 1, "a": (2,)}))
    assert trees.from_json(json.loads(json.dumps(trees.to_json(tree)))) == tree


@pytest.mark.parametrize(
    "record",
    [
        {"type": "os:system", "fields": {}},
        {"type": "jaxinf.cache:window_of", "fields": {}},
        {"type": "jaxinf.cache:DenseCache"},
        {"other": 1},
        3,
    ],
)
def test_other_records_are_no_structures(record) -> None:
    with pytest.raises(InputError, match="describes no structure"):
        trees.from_json(record)


def test_the_portable_form_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    from jaxinf.aot.portable import exported

    @jax.jit
    def program(pair, scale):
        return {"sum": pair[0] @ pair[1] * scale}

    x, y = np.eye(4, dtype=np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)
    stored = exported(program, ((x, y), np.float32(3)), {}, ("cpu", "tpu"))
    read = jax.export.deserialize(bytearray(stored))
    assert read.platforms == ("cpu", "tpu")
    np.testing.assert_array_equal(read.call(x, y, np.float32(3))[0], 3 * y)

    entries = LM(model(spec())).save_programs(tmp_path / "programs", 8, 8, portable=("cpu",))
    for entry in entries:
        assert jax.export.deserialize(bytearray((tmp_path / "programs" / entry["portable"]).read_bytes())).in_avals


def test_without_flatbuffers_the_portable_form_says_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UnsupportedError, match=r'pip install "jaxinf\[portable\]"'):
        LM(model(spec())).save_programs(tmp_path / "programs", 8, 8, portable=("cpu",))
    assert not (tmp_path / "programs").exists()
