"""The corpus of the embedded models: the source of CPython 3.11.7's standard library, with its tests.

A manifest names every file with its sha256 and its part:

- `train`: trained on.
- `heldout`: about a twentieth of the modules, each with its tests and whole packages together, for scoring.
- `duplicate`: left out of both, because it shares too much text with a held-out file.

The rule is deterministic. A file belongs to a *group*, the module it implements or tests (`group_of`).
Groups are taken in the order of the sha256 of their names, leaving out any that would bring the held-out
text above `HELDOUT_BYTES` or is more than a tenth of that by itself, so that no module dominates the score.
A training file is a near-duplicate when at least `CONTAINMENT` of its line shingles occur in held-out
files, or when it holds at least `CONTAINMENT` of the shingles of one held-out file (Broder, "On the
resemblance and containment of documents", 1997). The manifest ships beside this module; building it again
must give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pallas_kernels.errors import CheckpointError, InputError

Part = Literal["train", "heldout", "duplicate"]

PYTHON_VERSION = "3.11.7"
MANIFEST = Path(__file__).parent / "stdlib_manifest.json"
SHINGLE_LINES = 5
CONTAINMENT = 0.2
HELDOUT_BYTES = 1_400_000

_SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "lib-dynload"})
# Written by the build of the interpreter, so that they differ between machines.
_BUILD_PRODUCTS = ("_sysconfigdata_", "config-")


@dataclass(frozen=True)
class Entry:
    """One file: its path relative to the library's root, its sha256 in hex, and its part."""

    path: str
    sha256: str
    part: Part


@dataclass(frozen=True)
class Manifest:
    """The files of a corpus, in order of path, and the release of Python they come from."""

    python: str
    entries: tuple[Entry, ...]

    def part(self, part: Part) -> tuple[Entry, ...]:
        """The entries of one part, in order of path."""
        return tuple(entry for entry in self.entries if entry.part == part)

    def to_json(self) -> str:
        """A line a file, so that a change shows in a diff."""
        rows = ",\n".join(json.dumps([e.path, e.sha256, e.part]) for e in self.entries)
        return f'{{"python": {json.dumps(self.python)}, "files": [\n{rows}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote."""
        try:
            data = json.loads(text)
            entries = tuple(Entry(*row) for row in data["files"])
            bad = [e.path for e in entries if e.part not in get_args(Part)]
            if bad:
                raise ValueError(f"unknown part of {bad[0]}")
            return cls(str(data["python"]), entries)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the manifest cannot be read ({error}): restore the one shipped") from error


def load_manifest(path: Path = MANIFEST) -> Manifest:
    """The manifest that ships with the package."""
    return Manifest.from_json(path.read_text(encoding="utf-8"))


def default_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Path relative to `root` and content of each UTF-8 `*.py` file, in order of path."""
    found = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_PRODUCTS)
        ]
        found += [
            (here / name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith(_BUILD_PRODUCTS)
        ]
    for path in sorted(found):
        content = (root / path).read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield path, content


def group_of(path: str, modules: Iterable[str]) -> str:
    """The module that a file implements or tests; `modules` are the library's top-level names.

    `json/decoder.py`, `test/test_json/test_dump.py` -> `json`; `_pydecimal.py`, `test/test_decimal.py` ->
    `decimal`; `test/test_importlib/...` -> `importlib`; `test/pickletester.py` -> `pickle`. A test of no
    module (`test_generators.py`) is a group of its own; so is each of the test suite's support packages.
    """
    known = set(modules)
    parts = path.removesuffix(".py").split("/")
    if parts[0] != "test":
        return _public_name(parts[0], known)
    if len(parts) == 1 or parts[1] == "__init__":
        return "test"
    name = re.sub(r"^_*(test_)?", "", parts[1])
    if name in known:
        return _public_name(name, known)
    prefixes = [m for m in known if len(m) > 3 and name.startswith(m)]
    if prefixes:
        return _public_name(max(prefixes, key=len), known)
    # Tests of one subject come in numbered or suffixed files: test_generators, test_generator_stop.
    return "test_" + re.sub(r"s?\d*$", "", re.split("[_-]", name)[0])


def _public_name(module: str, known: set[str]) -> str:
    """`_pydecimal` -> `decimal`: a private implementation belongs to the module that offers it."""
    bare = module.lstrip("_")
    for name in (bare, re.sub(r"^py_?", "", bare)):
        if module.startswith("_") and name in known:
            return name
    return bare or module


def choose_held_out(sizes: dict[str, int]) -> set[str]:
    """The groups to hold out, given each group's bytes (see the module's docstring)."""
    chosen, total = set(), 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[group] <= HELDOUT_BYTES // 10 and total + sizes[group] <= HELDOUT_BYTES:
            chosen.add(group)
            total += sizes[group]
    return chosen


def shingles(content: bytes) -> set[int]:
    """Hashes of each run of `SHINGLE_LINES` consecutive lines, stripped, without blank lines.

    A shorter file is one shingle.
    """
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return set()
    windows = range(max(1, len(lines) - SHINGLE_LINES + 1))
    return {_hash(b"\n".join(lines[i : i + SHINGLE_LINES])) for i in windows}


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def near_duplicates(candidates: dict[str, bytes], heldout: dict[str, bytes]) -> set[str]:
    """The candidates that share too much text with a held-out file (see the module's docstring)."""
    holders: dict[int, list[str]] = {}
    sizes: dict[str, int] = {}
    for path, content in heldout.items():
        own = shingles(content)
        sizes[path] = len(own)
        for shingle in own:
            holders.setdefault(shingle, []).append(path)
    dropped = set()
    for path, content in candidates.items():
        own = shingles(content)
        shared = [s for s in own if s in holders]
        if not shared:
            continue
        covered = Counter(name for s in shared for name in holders[s])
        if len(shared) >= CONTAINMENT * len(own) or any(
            count >= CONTAINMENT * sizes[name] for name, count in covered.items()
        ):
            dropped.add(path)
    return dropped


def build_manifest(root: Path | None = None) -> Manifest:
    """Split the library under `root` by the rule of the module's docstring."""
    files = dict(find_files(default_root() if root is None else root))
    if not files:
        raise InputError(f"no Python source under {root}: give the Lib folder of Python {PYTHON_VERSION}")
    modules = {path.split("/")[0].removesuffix(".py") for path in files} - {"test"}
    groups = {path: group_of(path, modules) for path in files}
    sizes = Counter[str]()
    for path, content in files.items():
        sizes[groups[path]] += len(content)
    chosen = choose_held_out(sizes)
    heldout = {path: text for path, text in files.items() if groups[path] in chosen}
    rest = {path: text for path, text in files.items() if path not in heldout}
    dropped = near_duplicates(rest, heldout)
    entries = []
    for path, content in files.items():
        part: Part = "heldout" if path in heldout else "duplicate" if path in dropped else "train"
        entries.append(Entry(path, hashlib.sha256(content).hexdigest(), part))
    return Manifest(PYTHON_VERSION, tuple(entries))


def read_part(part: Part, root: Path | None = None, manifest: Manifest | None = None) -> dict[str, bytes]:
    """The files of one part, path to content, each checked against its hash.

    Raises `CheckpointError` naming the files that are absent or differ: the corpus is the standard library
    of Python 3.11.7, so another release gives other bytes.
    """
    manifest = load_manifest() if manifest is None else manifest
    root = default_root() if root is None else root
    content: dict[str, bytes] = {}
    wrong = []
    for entry in manifest.part(part):
        try:
            data = (root / entry.path).read_bytes()
        except OSError:
            wrong.append(entry.path)
            continue
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            wrong.append(entry.path)
        content[entry.path] = data
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise CheckpointError(
            f"{len(wrong)} of {len(manifest.part(part))} files under {root} are absent or differ from the "
            f"manifest ({shown}): give the Lib folder of Python {manifest.python}"
        )
    return content


def write_held_out(path: Path, files: dict[str, bytes]) -> None:
    """Store files as one xz file: a line of JSON, `[[path, bytes], ...]`, then their concatenation."""
    index = json.dumps([[name, len(data)] for name, data in files.items()]).encode()
    blob = lzma.compress(index + b"\n" + b"".join(files.values()), preset=9 | lzma.PRESET_EXTREME)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(blob)
    beside.replace(path)


def read_held_out(path: Path) -> dict[str, bytes]:
    """Read what `write_held_out` stored: path to content, in order."""
    try:
        index, _, text = lzma.decompress(path.read_bytes()).partition(b"\n")
        sizes = json.loads(index)
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise CheckpointError(f"{path} holds no held-out text ({error}): restore the one shipped") from error
    files, at = {}, 0
    for name, size in sizes:
        files[name] = text[at : at + size]
        at += size
    if at != len(text):
        raise CheckpointError(f"{path} has {len(text)} bytes where its index says {at}: restore the one shipped")
    return files


def main(arguments: Sequence[str]) -> None:
    """`python -m jaxinf.training.corpus [--held-out FILE]`: write the manifest and the held-out text."""
    if sys.version.split()[0] != PYTHON_VERSION:
        raise InputError(f"this is Python {sys.version.split()[0]}: the corpus is that of {PYTHON_VERSION}")
    manifest = build_manifest()
    beside = MANIFEST.with_suffix(".part")
    beside.write_text(manifest.to_json(), encoding="utf-8")
    beside.replace(MANIFEST)
    for part in get_args(Part):
        sizes = [len(data) for data in read_part(part, manifest=manifest).values()]
        print(f"{part}: {len(sizes)} files, {sum(sizes)} bytes")
    if len(arguments) == 2 and arguments[0] == "--held-out":
        write_held_out(Path(arguments[1]), read_part("heldout", manifest=manifest))


if __name__ == "__main__":
    main(sys.argv[1:])
