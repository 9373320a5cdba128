"""The manifest, the split and its rules."""

import hashlib
import lzma
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from jaxinf.training import corpus
from jaxinf.training.evaluate import xz_bits_per_byte
from pallas_kernels.errors import CheckpointError, InputError

HELD_OUT = Path(__file__).parents[1] / "data" / "stdlib_heldout.xz"
same_python = pytest.mark.skipif(
    sys.version.split()[0] != corpus.PYTHON_VERSION, reason="the corpus is that of another Python"
)


@pytest.fixture(scope="module")
def manifest() -> corpus.Manifest:
    return corpus.load_manifest()


@pytest.fixture(scope="module")
def held_out() -> dict[str, bytes]:
    return corpus.read_held_out(HELD_OUT)


def test_manifest_round_trips_and_is_sorted(manifest):
    assert manifest.to_json() == corpus.MANIFEST.read_text(encoding="utf-8")
    paths = [e.path for e in manifest.entries]
    assert paths == sorted(set(paths))


def test_the_held_out_text_is_that_of_the_manifest(manifest, held_out):
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in held_out.items()}
    assert hashes == {e.path: e.sha256 for e in manifest.part("heldout")}
    assert 1_200_000 <= sum(map(len, held_out.values())) <= 1_600_000


def test_a_module_and_its_tests_are_on_one_side(manifest):
    modules = {e.path.split("/")[0].removesuffix(".py") for e in manifest.entries} - {"test"}
    sides = defaultdict(set)
    for e in manifest.entries:
        sides[corpus.group_of(e.path, modules)].add(e.part == "heldout")
    assert all(len(side) == 1 for side in sides.values())
    held = {group for group, side in sides.items() if side == {True}}
    assert {"json", "shlex", "operator"} <= held
    assert len(held) / len(sides) > 0.05


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("json/decoder.py", "json"),
        ("test/test_json/test_dump.py", "json"),
        ("_pydecimal.py", "decimal"),
        ("test/test_decimal.py", "decimal"),
        ("test/pickletester.py", "pickle"),
        ("test/_test_pickle.py", "pickle"),
        ("test/test_generator_stop.py", "test_generator"),
        ("test/test_generators.py", "test_generator"),
        ("test/__init__.py", "test"),
    ],
)
def test_groups(path, group):
    modules = {"json", "_pydecimal", "decimal", "pickle", "re"}
    assert corpus.group_of(path, modules) == group


@same_python
def test_building_the_manifest_again_gives_the_same(manifest):
    assert corpus.build_manifest() == manifest


@same_python
def test_training_files_share_little_with_held_out_ones(manifest, held_out):
    train = corpus.read_part("train", manifest=manifest)
    assert not set(train) & set(held_out)
    seen = set().union(*map(corpus.shingles, held_out.values()))
    for path, data in train.items():
        own = corpus.shingles(data)
        assert len(own & seen) <= corpus.CONTAINMENT * len(own), path
    duplicates = {e.path for e in manifest.part("duplicate")}
    assert corpus.near_duplicates(corpus.read_part("duplicate", manifest=manifest), held_out) == duplicates


def _lines(start: int, stop: int) -> bytes:
    return "".join(f"    x = {i}\n" for i in range(start, stop)).encode()


def test_near_duplicates_are_found_in_both_directions():
    held = {"small.py": _lines(0, 30), "big.py": _lines(1000, 1400)}
    candidates = {
        "copy.py": _lines(0, 30).replace(b"    ", b"\t") + b"\n\n",
        "holds_a_copy.py": _lines(5000, 6000) + _lines(0, 30),
        "part_of_big.py": _lines(1100, 1140) + _lines(7000, 7040),
        "few_lines.py": _lines(0, 8) + _lines(2000, 2100),
        "other.py": _lines(3000, 3100),
        "empty.py": b"\n",
    }
    found = corpus.near_duplicates(candidates, held)
    assert found == {"copy.py", "holds_a_copy.py", "part_of_big.py"}


def test_large_groups_are_not_held_out():
    sizes = {f"g{i}": 10_000 for i in range(200)} | {"huge": corpus.HELDOUT_BYTES // 10 + 1}
    chosen = corpus.choose_held_out(sizes)
    assert "huge" not in chosen
    assert sum(sizes[g] for g in chosen) == corpus.HELDOUT_BYTES


def test_a_changed_or_absent_file_is_named(tmp_path):
    (tmp_path / "a.py").write_bytes(b"a = 1\n")
    good = hashlib.sha256(b"a = 1\n").hexdigest()
    one = corpus.Manifest("3.11.7", (corpus.Entry("a.py", good, "train"),))
    assert corpus.read_part("train", tmp_path, one) == {"a.py": b"a = 1\n"}
    two = corpus.Manifest("3.11.7", (*one.entries, corpus.Entry("b.py", good, "train")))
    with pytest.raises(CheckpointError, match=r"1 of 2 files .*b\.py.*3\.11\.7"):
        corpus.read_part("train", tmp_path, two)
    (tmp_path / "a.py").write_bytes(b"a = 2\n")
    with pytest.raises(CheckpointError, match=r"a\.py"):
        corpus.read_part("train", tmp_path, one)


def test_files_that_are_no_utf8_source_are_left_out(tmp_path):
    for name, data in {
        "a.py": b"x",
        "b.py": b"\xff",
        "c.txt": b"x",
        "site-packages/d.py": b"x",
        "pkg/e.py": b"",
        "_sysconfigdata_x.py": b"x",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    assert [path for path, _ in corpus.find_files(tmp_path)] == ["a.py", "pkg/e.py"]
    with pytest.raises(InputError, match="no Python source"):
        corpus.build_manifest(tmp_path / "pkg" / "none")


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="manifest"):
        corpus.Manifest.from_json('{"python": "3.11.7"}')
    with pytest.raises(CheckpointError, match="unknown part"):
        corpus.Manifest.from_json('{"python": "3.11.7", "files": [["a", "b", "other"]]}')
    path = tmp_path / "text.xz"
    corpus.write_held_out(path, {"a.py": b"one", "b.py": b"", "c.py": b"three"})
    assert corpus.read_held_out(path) == {"a.py": b"one", "b.py": b"", "c.py": b"three"}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="held-out"):
        corpus.read_held_out(path)


def test_xz_figure(held_out):
    data = b"".join(held_out.values())[:200_000]
    packed = lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert lzma.decompress(packed) == data
    assert xz_bits_per_byte(data) == 8 * len(packed) / len(data)
    with pytest.raises(InputError):
        xz_bits_per_byte(b"")
